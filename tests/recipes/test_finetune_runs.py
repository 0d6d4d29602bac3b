"""Runs that are stopped, repeated, changed between, and ended by an error."""

from importlib.util import find_spec

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from recipes.finetune.config import ConfigError, OutputError
from recipes.finetune.prepare import check_samples, training_arguments
from recipes.finetune.run import fine_tune
from tests.families import family
from tests.recipes.finetuning import BATCH, SAMPLES, SAVES, changed, losses, make_config, sample, skipped


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because all models here are tiny."""


class Stop(TrainerCallback):
    """Ends a training after a step, as an error would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_run_continues_with_the_same_bits(method, tmp_path):
    """In its second epoch, with samples of several kinds, dropout in the adapters, and accumulation."""
    options = dict(max_steps=6, save_steps=2, method=method, trainer=SAVES, global_batch=2, per_device_batch=1)
    options |= {"lora": {"rank": 2, "dropout": 0.2, "merge": False}}
    folder = family("standard").folder
    whole, stopped = (make_config(tmp_path / name, folder, SAMPLES, **options) for name in ("a", "b"))
    out = fine_tune(whole)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(stopped, [Stop(5)])
    # A run that was killed while it wrote leaves a folder that is not whole.
    (stopped.output / "checkpoint-5").mkdir()
    again = fine_tune(stopped)
    assert losses(stopped)[-2:] == losses(whole)[-2:] and len(losses(whole)) == 6
    files = sorted(path.relative_to(out) for path in out.glob("*.safetensors"))
    assert files and all(changed(load_file(out / f), load_file(again / f)) == set() for f in files)
    with pytest.raises(ConfigError, match="holds checkpoints of a run with seed 42, not 7: name another output"):
        fine_tune(make_config(tmp_path / "b", folder, SAMPLES, **options, seed=7))


def test_a_finished_run_is_not_trained_on(tmp_path):
    """Its end lies within the second epoch. Repeated, or stopped while it wrote, it writes the same bytes."""
    config = make_config(
        tmp_path, family("standard").folder, SAMPLES, max_steps=4, save_steps=2, trainer=SAVES, global_batch=2
    )
    written = fine_tune(config) / "model.safetensors"
    first, state = written.read_bytes(), config.output / "checkpoint-4" / "trainer_state.json"
    written.unlink()
    assert fine_tune(config) / "model.safetensors" == written
    assert written.read_bytes() == first and len(losses(config)) == 4
    # The state was cut off while it was written: the run goes on from the checkpoint before.
    state.write_text(state.read_text()[:100])
    fine_tune(config)
    assert written.read_bytes() == first and len(losses(config)) == 6


def test_what_a_run_may_change_and_what_not(tmp_path):
    """How much is told may change; samples may not. The report of broken samples stays, with one line for each."""
    folder, bad = family("standard").folder, sample("a", "")
    config = make_config(tmp_path, folder, [*SAMPLES, bad], max_steps=1, trainer=SAVES)
    fine_tune(config)
    told = make_config(
        tmp_path, folder, [*SAMPLES, bad], max_steps=1, trainer={"logging_first_step": True}, log_steps=5
    )
    fine_tune(told)
    check_samples(told)
    assert skipped(told) == {6: "turn 2 is an empty answer"}
    with pytest.raises(ConfigError, match=r'holds checkpoints of a run with samples .*"7 samples, .*"8 samples, '):
        fine_tune(make_config(tmp_path, folder, [*SAMPLES, bad, bad], max_steps=1))
    (config.output / "settings.json").write_text('{"stage": ')
    with pytest.raises(ConfigError, match="settings.json cannot be read .*: remove it if"):
        fine_tune(config)


def test_a_run_that_learns_nothing_fails(tmp_path, caplog):
    folder, places = family("standard").folder, family("standard").processor.image_processor.tokens_per_picture
    config = make_config(tmp_path / "a", folder, SAMPLES, max_length=places)
    with pytest.raises(ConfigError, match="max_length: expected more than the 25 tokens of a picture, .* got 25"):
        fine_tune(config)
    config = make_config(tmp_path / "b", folder, SAMPLES, max_length=places + 1)
    with pytest.raises(OutputError, match="no token was learned, so nothing is written: see .*skipped.jsonl"):
        fine_tune(config)
    assert not (config.output / "model").exists()
    assert "step 1: no token was learned yet" in caplog.text and "left out: 6 samples" in caplog.text


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    config = make_config(tmp_path, family("standard").folder, BATCH, max_steps=1, trainer=SAVES)
    monkeypatch.setattr("recipes.finetune.trainer.save_file", full)
    with pytest.raises(OutputError, match="out/checkpoint-1 cannot be written: .*File too large"):
        fine_tune(config)


def test_without_a_gpu_the_cpu_trains(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch.accelerator.is_available", lambda *_, **__: False)
    config = make_config(tmp_path, family("standard").folder, BATCH, device=None, dtype="bfloat16")
    assert training_arguments(config).use_cpu and "device: torch finds no GPU" in caplog.text


def test_an_attention_that_is_not_installed(tmp_path):
    if find_spec("flash_attn"):
        pytest.skip("flash attention is installed")
    config = make_config(tmp_path, family("standard").folder, BATCH, attention="flash_attention_2", dtype="bfloat16")
    with pytest.raises(ConfigError, match="attention: flash_attention_2: .*[Ff]lash"):
        fine_tune(config)


def test_folders_that_cannot_be_made(tmp_path):
    folder, file = family("standard").folder, tmp_path / "file"
    file.write_text("")
    for output in (file, file / "x", "/proc/x"):
        with pytest.raises(ConfigError, match=f"output: {output} cannot be made: "):
            fine_tune(make_config(tmp_path / "a", folder, BATCH, output=str(output)))
    with pytest.raises(ConfigError, match=f"feature_cache: {file} cannot be made: "):
        fine_tune(make_config(tmp_path / "b", folder, BATCH, feature_cache=str(file)))
