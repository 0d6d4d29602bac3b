"""Trainings in processes of their own: one that is killed and continues, and two that share the samples."""

import json
import signal
import socket
from pathlib import Path

import pytest
import torch
import yaml

from tests.checkpoints import tensors_of
from tests.families import family
from tests.forked_python import PACKAGE, python
from tests.recipes.finetuning import SAMPLES, SAVES, losses, make_config, settings

pytestmark = pytest.mark.slow

IMPORTED = (*PACKAGE, "transformers.trainer", "safetensors.torch")
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
# Goes before TRAIN: lets accelerate divide the model by FSDP2, as our file says. `accelerate launch` puts the same keys
# into the environment. accelerate leaves FSDP out for processes on a CPU, so these are passed off as ones on GPUs.
FSDP = """
import os
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

asked = load_config_from_file("recipes/finetune/accelerate/fsdp2-8gpu.yaml")
os.environ["ACCELERATE_USE_FSDP"], os.environ["ACCELERATE_MIXED_PRECISION"] = "true", asked.mixed_precision
os.environ |= {key.upper(): str(value) for key, value in asked.fsdp_config.items()}
begin = PartialState.__init__

def begin_as_on_gpus(self, *args, **options):
    begin(self, *args, **options)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

PartialState.__init__ = begin_as_on_gpus
"""
# Runs the program of the third argument in two processes, which find each other at the port of the first. The second
# and the fourth argument are the program's.
TWICE = """
import os, sys

def child(rank):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    sys.argv = ["train", sys.argv[2], sys.argv[4]]
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
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
"""

# Computes the gradients of a row with a picture and a row without, each on a process of its own, with the model divided
# by FSDP2 as accelerate divides it; compares them with those of both rows without any division.
DIVIDED = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers
from mg_fast.models.templates import render

torch.set_num_threads(1)
folder, picture = sys.argv[1].split("|")
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
model = MiniGeminiForConditionalGeneration.from_pretrained(folder, template="vicuna_v1").train()
processor = MiniGeminiProcessor.from_pretrained(folder, template="vicuna_v1")
towers = FrozenTowers(model.model)
rows = []
for text, images in (("<image>\\nWhat is it?", [picture]), ("Who are you?", None)):
    inputs = dict(processor(text=render("vicuna_v1", [(text, "Yes.")]), images=images, return_tensors="pt"))
    marks = inputs.pop("mm_token_type_ids")
    labels = inputs["input_ids"].masked_fill(marks == 1, -100)
    if images:
        features = towers(inputs.pop("pixel_values"), inputs.pop("pixel_values_hr"))
        rows.append(dict(inputs, labels=labels, mm_token_type_ids=marks, tower_features=features))
    else:
        rows.append(dict(inputs, labels=labels, tower_features=towers.nothing()))
for row in rows:
    (model(**row, use_cache=False).loss / 2).backward()
expected = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
mesh = init_device_mesh("cpu", (2,))
inner = model.model
for part in (*inner.language_model.layers, inner.patch_mining, model.get_input_embeddings(), model.lm_head):
    fully_shard(part, mesh=mesh)
fully_shard(model, mesh=mesh)
model(**rows[rank], use_cache=False).loss.backward()
assert type(inner.patch_mining.vlm_uni_aux_projector[1].weight).__name__ == "DTensor"
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
print("compared", len(expected))
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def file_of(folder: Path, samples: list = SAMPLES, **changes) -> tuple[Path, object]:
    """A configuration file in a folder, and what it says."""
    model = family("standard").folder
    asked = settings(folder, model, samples, **changes)
    file = folder / "training.yaml"
    file.write_text(yaml.safe_dump(asked))
    return file, make_config(folder, model, samples, **changes)


def losses_by_step(config) -> list[float]:
    """The loss of every step, the last one where a step was trained twice."""
    rows = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    return list({row["step"]: row["loss"] for row in rows if "loss" in row}.values())


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all weights."""
    return sum((second[name].double() - first[name].double()).square().sum().item() for name in first) ** 0.5


def run(*words, ends: int = 0) -> str:
    """What a program prints that ends with this status."""
    done = python("-c", *words, imported=IMPORTED)
    assert done.returncode == ends, done.stderr[-3000:]
    return done.stdout


def test_a_killed_run_continues_with_the_same_bits(tmp_path):
    options = dict(max_steps=5, save_steps=2, trainer=SAVES)
    (whole, asked), (killed, killed_asked) = (file_of(tmp_path / name, **options) for name in ("a", "b"))
    run(TRAIN, whole, 0)
    run(TRAIN, killed, 3, ends=-signal.SIGKILL)
    assert len(losses(killed_asked)) < 5
    run(TRAIN, killed, 0)
    assert losses_by_step(killed_asked) == losses(asked)
    first, second = (config.output / "model" / "model.safetensors" for config in (asked, killed_asked))
    assert first.read_bytes() == second.read_bytes()


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Over an epoch with pictures, several pictures and none, and one sample for both in its last step."""
    options = dict(samples=SAMPLES[1:], max_steps=4, group_by_length=True)
    alone, asked = file_of(tmp_path / "one", per_device_batch=2, **options)
    shared, shared_asked = file_of(tmp_path / "two", per_device_batch=1, **options)
    run(TRAIN, alone, 0)
    run(TWICE, free_port(), shared, TRAIN, 0)
    assert losses(shared_asked) == pytest.approx(losses(asked), rel=1e-5) and len(losses(asked)) == 4
    assert (shared_asked.output / "model" / "model.safetensors").is_file()


def test_fsdp_by_accelerates_file(tmp_path):
    """In bfloat16, with layers computed again, and killed on the way: one process' losses, in bfloat16's precision."""
    options = dict(max_steps=4, save_steps=2, trainer=SAVES, dtype="bfloat16", gradient_checkpointing=True)
    alone, asked = file_of(tmp_path / "one", **options)
    shared, shared_asked = file_of(tmp_path / "two", per_device_batch=1, **options)
    run(TRAIN, alone, 0)
    run(TWICE, free_port(), shared, FSDP + TRAIN, 3, ends=1)
    assert (shared_asked.output / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    assert len(losses(shared_asked)) < 4
    run(TWICE, free_port(), shared, FSDP + TRAIN, 0)
    assert losses_by_step(shared_asked) == pytest.approx(losses(asked), rel=1e-2)
    first, second = (tensors_of(config.output / "model") for config in (asked, shared_asked))
    assert first.keys() == second.keys() and {tensor.dtype for tensor in second.values()} == {torch.bfloat16}
    # Both start from the weights in bfloat16. Over all weights, they differ by less than a tenth of what was learned.
    start = {name: tensor.bfloat16() for name, tensor in tensors_of(family("standard").folder).items()}
    assert distance(first, second) < 0.1 * distance(first, start)


def test_fsdp_divides_the_model():
    """Mining reads its weights in its own forward pass, for which FSDP has gathered them."""
    found = family("standard")
    told = run(TWICE, free_port(), f"{found.folder}|{found.pictures[0]}", DIVIDED, 0)
    assert told.count("compared") == 2 and int(told.split()[1]) > 20
