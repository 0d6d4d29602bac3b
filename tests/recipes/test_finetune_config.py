"""The configuration of a training: its defaults, the files for all models, and what is told of a wrong one."""

import subprocess
import sys

import pytest
import yaml

from recipes.finetune.__main__ import main
from recipes.finetune.config import ConfigError, FineTuneConfig, parse_config, read_config
from recipes.finetune.index import index_file
from recipes.finetune.samples import read_sample
from tests.paths import ROOT

FOLDER = ROOT / "recipes" / "finetune"
LEAST = {"stage": 2, "model": "m", "output": "o", "data": [{"file": "a.json"}]}
# Samples of one GPU, passes and GPUs of the original: stage 1, stage 2 and stage 2 in HD.
LAYOUTS = {
    "2b": ((8, 4, 8), (8, 2, 8), (4, 1, 32)),
    "7b": ((16, 1, 16), (8, 1, 16), (4, 1, 32)),
    "13b": ((8, 1, 32), (4, 1, 32), (4, 1, 32)),
    "8b": ((16, 1, 16), (8, 1, 16), (4, 2, 16)),
    "8x7b": ((8, 1, 32), (4, 1, 32), (4, 1, 32)),
    "34b": ((8, 1, 32), (4, 1, 32), (4, 1, 32)),
}


@pytest.mark.parametrize("model", LAYOUTS)
def test_the_files_hold_the_originals_settings(model):
    one, two, hd = (
        read_config(FOLDER / "configs" / f"{model}-{kind}.yaml") for kind in ("stage1", "stage2", "hd-stage2")
    )
    for config, (batch, passes, gpus) in zip((one, two, hd), LAYOUTS[model]):
        assert config.per_device_batch == batch and config.accumulation(gpus) == passes
        assert (config.schedule, config.warmup, config.weight_decay, config.epochs) == ("cosine", 0.03, 0.0, 1.0)
        assert config.gradient_checkpointing and config.dtype == "bfloat16"
    assert (one.stage, one.learning_rate, one.image_mode, one.max_length, one.global_batch) == (
        1,
        1e-3,
        "square",
        2048,
        256,
    )
    assert not one.group_by_length and two.group_by_length and hd.group_by_length
    assert (two.image_mode, two.max_length, hd.max_length, two.hd, hd.hd) == ("pad", 2048, 4096, False, True)
    large = model in ("8x7b", "34b")
    times = {"mm_projector": 2.0, "vlm_uni": 2.0} if large else {}
    assert all((c.learning_rate, dict(c.learning_rate_times)) == (1e-5 if large else 2e-5, times) for c in (two, hd))
    assert two.adapter == hd.adapter == str(one.output / "model") and two.model == one.model


def test_every_file_is_a_configuration():
    files = sorted((FOLDER / "configs").glob("*.yaml"))
    assert len(files) == 3 * len(LAYOUTS) + 2 and all(isinstance(read_config(file), FineTuneConfig) for file in files)


@pytest.mark.parametrize("file", sorted((FOLDER / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_files(file):
    from accelerate.commands.config.config_args import load_config_from_file

    read, written = load_config_from_file(str(file)), yaml.safe_load(file.read_text())
    kind = "FSDP" if file.stem.startswith("fsdp2") else "DEEPSPEED"
    assert str(read.distributed_type).endswith(kind) and read.mixed_precision == "bf16"
    assert read.num_processes == written["num_processes"] == int(file.stem.rpartition("-")[2].removesuffix("gpu"))
    assert "has not been tried on a GPU yet" in file.read_text()
    if kind == "FSDP":
        assert read.fsdp_config["fsdp_version"] == 2 and not read.fsdp_config["fsdp_cpu_ram_efficient_loading"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"stage": 3}, "stage: expected one of 1, 2, got 3"),
        ({"model": None}, "model: missing"),
        ({"learning_rat": 1}, "learning_rat: unknown, did you mean learning_rate?"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number above 0, got 'fast'"),
        ({"learning_rate": True}, "learning_rate: expected a number above 0, got True"),
        ({"warmup": 3}, "warmup: expected a number of at least 0 and at most 1, got 3"),
        ({"workers": 1.5}, "workers: expected a whole number of at least 0, got 1.5"),
        ({"hd": "yes"}, "hd: expected true or false, got 'yes'"),
        ({"data": []}, "data: expected a list of sources, each with a file or a dataset, got []"),
        ({"data": [{"file": "a.csv"}]}, "data[0].file: expected a .json or .jsonl file, got 'a.csv'"),
        ({"data": [{"file": "a.json", "dataset": "b"}]}, "data[0]: expected either a file or a dataset"),
        ({"data": [{"fil": "a.json"}]}, "data[0].fil: unknown, did you mean data[0].file?"),
        ({"lora": {"rank": 0}}, "lora.rank: expected a whole number of at least 1, got 0"),
        ({"trainer": {"seed": 1}}, "trainer.seed: the key seed of this file sets it"),
        ({"stage": 1, "method": "lora"}, "method: stage 1 trains no language model"),
        ({"stage": 1, "hd": True}, "hd: the original trains no HD stage 1"),
        ({"template": "plain"}, "template: plain is for the captions of stage 1"),
        ({"data": ["a.json"]}, "data[0]: expected a section of keys and values, got 'a.json'"),
        ({"learning_rate_times": {"lm_head": "x"}}, "learning_rate_times.lm_head: expected a number above 0, got 'x'"),
        ({"warmup": 1}, "warmup: expected a share of all steps, below 1, got 1"),
        ({"trainer": {"save_only_model": True}}, "trainer.save_only_model: a run that was stopped could not continue"),
        ({"device": "cpu", "liger": True}, "liger: its kernels need a GPU"),
    ],
)
def test_a_wrong_setting_is_told(changes, expected):
    with pytest.raises(ConfigError) as caught:
        parse_config({**LEAST, **changes}, "FILE")
    assert str(caught.value).startswith("FILE: ") and expected in str(caught.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError, match="stage: expected.*output: missing.*hd: expected"):
        parse_config({**LEAST, "stage": 0, "hd": 1, "output": None})


def test_numbers_without_a_point_are_numbers():
    """YAML reads 1e-3 as a text."""
    assert parse_config({**LEAST, "learning_rate": yaml.safe_load("1e-3")}).learning_rate == 1e-3


def test_values_of_the_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    config = read_config(
        file, {"lora.rank": "8", "method": "lora", "output": "elsewhere", "trainer.save_strategy": "no"}
    )
    assert config.trainer == {"save_strategy": "no"}
    assert (config.lora.rank, config.lora.alpha, str(config.output)) == (8, 16, "elsewhere")
    with pytest.raises(ConfigError, match="lora.rnak: unknown, did you mean lora.rank"):
        read_config(file, {"lora.rnak": "8"})


def test_a_batch_that_cannot_be_divided():
    config = parse_config({**LEAST, "per_device_batch": 8})
    assert config.accumulation(8) == 2
    with pytest.raises(ConfigError, match="expected a multiple of per_device_batch 8 times 3"):
        config.accumulation(3)


def test_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("stage: [")
    for words, expected in (([file], "cannot be read as YAML"), ([file, "--set", "x"], "--set: expected KEY=VALUE")):
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err
        assert ended.value.code == 1 and told.count("\n") == 1 and expected in told


@pytest.mark.slow
def test_help_needs_no_library_of_training():
    """Neither the optional packages nor torch and transformers are imported."""
    forbidden = ("peft", "bitsandbytes", "deepspeed", "datasets", "liger_kernel", "torch", "transformers", "accelerate")
    code = (
        f"import sys\nfor name in {forbidden}: sys.modules[name] = None\n"
        "sys.argv = ['finetune', '--help']\nfrom recipes.finetune.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: python -m recipes.finetune" in done.stdout, done.stderr


# ---- files of samples


def test_a_file_that_is_no_list_is_refused(tmp_path):
    file = tmp_path / "a.json"
    for text, expected in (
        ("{}", r"expected a list of samples, which begins with \[, got '\{'"),
        ("", r"expected a list of samples, which begins with \[, got ''"),
        ("[1 2]", "broken at byte 3, before sample 1: expected , or ] after sample 0"),
        ("[1][2]", r"broken at byte 3, before sample 1: expected nothing after the list's \]"),
        ("[1]\n garbage", "broken at byte 5, before sample 1: expected nothing after"),
        ("[" * 10**5, "broken at byte 1, before sample 0: lists or objects are nested too deeply"),
        ('[{"a": 1}, {"b"', "broken at byte 11, before sample 1: sample 1 is no JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            index_file(file, read_sample)
    file.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ConfigError, match="is not in UTF-8"):
        index_file(file, read_sample)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        index_file(tmp_path / "b.json", read_sample)
