"""mg-fast warmup: what it compiles is what a model launches, counted in processes of their own; its errors."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from mg_fast import backend, cli
from tests.paths import OWN_GOLDEN, ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is published for Linux only")

# A model as loaded, on a GPU that is not here: what its picture tower launches is looked up in Triton's cache, or compiled.
LAUNCH = """
import json, sys
import timm.models.convnext
import torch
from triton import knobs
import mg_fast
from mg_fast import warmup
from mg_fast.ops import mining
from mg_fast.kernels.patch_mining import pool_windows_bwd, pool_windows_fwd

folder, architecture, dtype, batch, training = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)

def launch(queries, pyramid, grid):
    # the operator of torch would not launch for a fake tensor
    pooled, statistics = pool_windows_fwd(queries, pyramid, grid)
    if training:
        pool_windows_bwd(torch.empty_like(pooled), queries, pyramid, statistics, grid)
    return pooled, statistics

mining.pool_windows = launch
# reads numbers, which fake tensors have not
timm.models.convnext.calculate_drop_path_rates = lambda rate, depths, **_: [[0.0] * depth for depth in depths]
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
config = warmup.model_config(folder)
torch.set_default_dtype(dtype)
with warmup.compile_only(architecture), torch.no_grad():
    with torch.device("cuda"):
        model = mg_fast.MiniGeminiForConditionalGeneration(config)
    side, high = config.vision_config.image_size, config.image_size_aux
    pixels = torch.empty(batch, config.views, 3, side, side, dtype=dtype, device="cuda")
    with mg_fast.use_backend("triton"):
        model.get_image_features(pixels, torch.empty(batch, 3, high, high, dtype=dtype, device="cuda"))
print(json.dumps({"hits": hits.count(True), "misses": hits.count(False)}))
"""


def process(*command, cache):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(folder, cache, *, architecture=90, dtype="float16", batch=1, training=False):
    out = process("-c", LAUNCH, json.dumps([str(folder), architecture, dtype, batch, training]), cache=cache)
    return json.loads(out.splitlines()[-1])


@needs_triton
def test_the_first_launch_compiles_nothing(tmp_path):
    """In HD, whose two launches are of two kernels; for any batch; and not for what was not warmed up."""
    folder, arguments = (
        OWN_GOLDEN / "hd",
        ("-m", "mg_fast", "warmup", "--arch", "sm_90", "--dtype", "float16", "--model", OWN_GOLDEN / "hd"),
    )
    lines = process(*arguments, cache=tmp_path).splitlines()
    assert [line.split()[:5] for line in lines[:2]] == [["pool_windows_fwd_kernel", "sm_90", "float16", "320", "pixels"]] * 2
    assert all(line.endswith(" s") for line in lines[:2])
    assert lines[2] == f"2 kernels in {tmp_path}: 2 compiled now, 0 were there" and "launchers in C are still built" in lines[3]
    for batch in (1, 8):
        assert launch(folder, tmp_path, batch=batch) == {"hits": 2, "misses": 0}
    # and a second warmup neither
    assert all(line.endswith(" cached") for line in process(*arguments, cache=tmp_path).splitlines()[:2])
    # each of these another key, or the counts above would mean nothing
    assert launch(folder, tmp_path, dtype="bfloat16") == {"hits": 0, "misses": 2}
    assert launch(folder, tmp_path, training=True) == {"hits": 2, "misses": 2}


@needs_triton
def test_training_and_several_architectures(tmp_path):
    folder = OWN_GOLDEN / "standard"
    arguments = ("--arch", "sm_90", "--arch", "sm_80", "--dtype", "bfloat16", "--training", "--model", folder)
    assert len(process("-m", "mg_fast", "warmup", *arguments, cache=tmp_path).splitlines()) == 2 * 2 + 2
    assert launch(folder, tmp_path, architecture=80, dtype="bfloat16", training=True) == {"hits": 2, "misses": 0}


@needs_triton
def test_the_published_sizes():
    from mg_fast.warmup import published_configs

    standard, hd = published_configs()
    for config in (standard, hd):
        assert config.tokens_per_view == 576 and config.vision_config_aux["dims"] == [192, 384, 768, 1536]
    assert (standard.image_size_aux, standard.image_grid, standard.views) == (768, 1, 1)
    assert (hd.image_size_aux, hd.image_grid, hd.views) == (1536, 2, 5)


# ---- errors


def failed(capsys, *arguments):
    code = cli.main(["warmup", "--arch", "sm_90", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return code, err.removeprefix("mg-fast: error: ").strip()


def test_triton_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert failed(capsys) == (6, "kernels cannot be compiled: triton is not installed (it is published for Linux only)")


@needs_triton
def test_errors(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert failed(capsys) == (6, "kernels cannot be compiled: TRITON_INTERPRET=1 is set, under which kernels are interpreted: unset it")
    monkeypatch.delenv("TRITON_INTERPRET")
    code, message = failed(capsys, "--model", tmp_path)
    assert code == 3 and message.startswith(f"{tmp_path} has no config.json")
    config = {"model_type": "mgm", "image_size_aux": 768, "mm_vision_select_layer": -2, "mm_hidden_size_aux": 1234}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, message = failed(capsys, "--model", tmp_path)
    assert code == 3 and "mm_hidden_size_aux=1234 and not the widths that add up to it" in message


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --arch"),
        (["--arch", "sm_91"], "--arch: expected one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, got 'sm_91'"),
        (["--arch", "90"], "expected one of sm_80"),
        (["--arch", "sm_90", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(["warmup", *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err
