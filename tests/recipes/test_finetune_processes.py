"""Trainings in processes of their own: one that is killed and continues, and two that share the samples."""

import json
import socket
from pathlib import Path

import pytest
import yaml

from tests.families import family
from tests.forked_python import PACKAGE, python
from tests.recipes.finetuning import SAMPLES, losses, make_config, settings

pytestmark = pytest.mark.slow

IMPORTED = (*PACKAGE, "transformers.trainer", "safetensors.torch")
SAVES = {"disable_tqdm": True, "save_strategy": "steps"}
# Trains as the file of the first argument says; kills itself after the step of the second.
TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from recipes.finetune.config import read_config
from recipes.finetune.run import fine_tune

torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

fine_tune(read_config(Path(sys.argv[1])), [Kill()])
"""
# Runs the program of the third argument in two processes, which find each other at the port of the first.
TWICE = """
import os, sys

def child(rank):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    sys.argv = ["train", sys.argv[2], "0"]
    exec(compile(program, "train", "exec"), {"__name__": "__main__"})

program = sys.argv[3]
children = []
for rank in range(2):
    if (pid := os.fork()) == 0:
        status = 1
        try:
            child(rank)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    children.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def file_of(folder: Path, **changes) -> tuple[Path, object]:
    """A configuration file in a folder, and what it says."""
    model = family("standard").folder
    asked = settings(folder, model, SAMPLES, **changes)
    file = folder / "training.yaml"
    file.write_text(yaml.safe_dump(asked))
    return file, make_config(folder, model, SAMPLES, **changes)


def run(*words) -> int:
    done = python("-c", *words, imported=IMPORTED)
    if done.returncode > 0:
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


def test_a_killed_run_continues_with_the_same_bits(tmp_path):
    options = dict(max_steps=5, save_steps=2, trainer=SAVES)
    (whole, asked), (killed, killed_asked) = (file_of(tmp_path / name, **options) for name in ("a", "b"))
    assert run(TRAIN, whole, 0) == 0
    assert run(TRAIN, killed, 3) == -9
    assert len(losses(killed_asked)) < 5
    assert run(TRAIN, killed, 0) == 0
    rows = [json.loads(line) for line in (killed_asked.output / "log.jsonl").read_text().splitlines()]
    again = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [again[step] for step in range(1, 6)] == losses(asked)
    first, second = (config.output / "model" / "model.safetensors" for config in (asked, killed_asked))
    assert first.read_bytes() == second.read_bytes()


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Over an epoch with pictures, several pictures and none; what they write loads as one model."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = dict(max_steps=3, group_by_length=True)
    alone, asked = file_of(tmp_path / "one", per_device_batch=2, **options)
    shared, shared_asked = file_of(tmp_path / "two", per_device_batch=1, **options)
    assert run(TRAIN, alone, 0) == 0
    assert run(TWICE, port, shared, TRAIN) == 0
    assert losses(shared_asked) == pytest.approx(losses(asked), rel=1e-5) and len(losses(asked)) == 3
    assert (shared_asked.output / "model" / "model.safetensors").is_file()
