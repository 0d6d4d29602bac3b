"""`mg-fast compile` compiles the kernels that a model launches; the errors of `compile` and `warmup`.

The kernels are counted in separate processes.
"""

import importlib.util
import json
import os

import pytest

from mg_fast import cli
from mg_fast.ops import backend
from tests.forked_python import python
from tests.paths import OWN_GOLDEN

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is published for Linux only"
)

# For each case, this program runs a picture through a model as if it were loaded on a GPU. Each kernel launched on the
# way is looked up in Triton's cache, or compiled.
LAUNCH = """
import json, sys
import timm.models.convnext
import torch
from triton import knobs
import mg_fast
from mg_fast import ops
from mg_fast.models.mini_gemini.launches import model_config
from mg_fast.ops.ahead_of_time import compile_only

folder, *cases = json.loads(sys.argv[1])
# timm's own function reads numbers, which fake tensors do not have.
timm.models.convnext.calculate_drop_path_rates = lambda rate, depths, **_: [[0.0] * depth for depth in depths]
config = model_config(folder)
side, high, grid = config.vision_config.image_size, config.image_size_aux, config.image_grid

def launch(architecture, dtype, batch, training, backend):
    dtype, hits = getattr(torch, dtype), []
    torch.set_default_dtype(dtype)
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with compile_only(architecture, training=training), mg_fast.use_backend(backend), torch.set_grad_enabled(training):
        with torch.device("cuda"):
            model = mg_fast.MiniGeminiForConditionalGeneration(config)
            picture = torch.empty(300, 401, 3, dtype=torch.uint8)
        hr, views = ops.dual_resize(picture, high, side, grid=grid, global_view=config.image_global)
        hr, views = (part[None].to(dtype).expand(batch, *part.shape) for part in (hr, views))
        model.get_image_features(views, hr)
    return {"hits": hits.count(True), "misses": hits.count(False)}

print(json.dumps([launch(**case) for case in cases]))
"""


def process(*command, cache):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(cache)
    }
    # The command line says what is compiled, and the environment must not change that.
    environment["MG_FAST_BACKEND"] = "torch"
    done = python(*command, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(folder, cache, *cases):
    """For each case in turn, how many of the launched kernels were in the cache, and how many had to be compiled."""
    default = {"architecture": 90, "dtype": "float16", "batch": 1, "training": False, "backend": "auto"}
    out = process("-c", LAUNCH, json.dumps([str(folder), *(default | case for case in cases)]), cache=cache)
    found = json.loads(out.splitlines()[-1])
    return [(counts["hits"], counts["misses"]) for counts in found]


# Compiles what `mg-fast compile` does for a tiny MM-Interleaved, for fewer lengths, and then runs the model as if it
# were loaded on a GPU: a picture is seen, a token is decoded, and a step of a drawing is made.
LAUNCH_INTERLEAVED = """
import json
import torch
from triton import knobs
import mg_fast
from mg_fast.models.mm_interleaved import launches
from mg_fast.models.mm_interleaved.drawing_options import DrawingOptions
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.decoding.model_runner import ModelRunner
from mg_fast.models.protocol import PassInputs
from mg_fast.ops.ahead_of_time import compile_only
from mg_fast.testing.random_interleaved import make_interleaved_config

launches.PICTURES, launches.POSITIONS = (1,), (1,)
config, dtype, hits = make_interleaved_config("tiny"), torch.bfloat16, []
compiled = [kernel.name for kernel in launches.compile_kernels([90], [dtype], config)]
torch.set_default_dtype(dtype)
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
with compile_only(90), mg_fast.use_backend("auto"), torch.no_grad(), torch.device("cuda"):
    model = mg_fast.MMInterleavedForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    maps = model.get_image_features(torch.empty(1, 3, 224, 224)).last_hidden_state
    packed = PackedInterleavedDecoding(model)
    runner = ModelRunner(packed, graphs=False)
    sequences = runner.sequences(1, 8)
    values = packed.language_model.project_pictures(maps)[None]
    index = torch.ones(1, 1, 1, dtype=torch.long)
    sequences.fill(None, PassInputs({"picture_values": values}, {"picture_index": index}))
    runner.step(sequences, torch.zeros(1, dtype=torch.long))
    drawer = model.picture_drawer(graphs=False)
    condition = torch.empty(1, config.condition_length, config.condition_width, dtype=dtype)
    constants = drawer.constants(condition, maps[None], None, DrawingOptions())
    latents = torch.empty(model.image_decoder.latents_shape(1), dtype=torch.float32)
    drawer.predict(latents, torch.zeros((), dtype=torch.long), constants)
print(json.dumps([sorted(set(compiled)), hits.count(True), hits.count(False)]))
"""


# In the order of launches for one picture: one norm for each stage of the tower, of which the second and the fourth
# allow wide loads and are convolved on tensor cores; then mining with its pass over the
# pyramid, the cells and the global view.
HD_KERNELS = [
    *("resize_columns_fwd_kernel", "resize_rows_fwd_kernel"),
    *["dwconv_norm_fwd_kernel", "dwconv_bands_fwd_kernel", "pixel_norm_fwd_kernel"] * 2,
    "pixel_fields_fwd_kernel",
    *["pool_coarse_fwd_kernel"] * 2,
]


@pytest.mark.slow
@needs_triton
def test_the_first_launch_compiles_nothing(tmp_path):
    """In HD, where mining has three kernels, everything asked for is compiled, for any batch, and nothing else is."""
    folder, arguments = (
        OWN_GOLDEN / "hd",
        ("-m", "mg_fast", "compile", "--arch", "sm_90", "--dtype", "float16", "--model", OWN_GOLDEN / "hd"),
    )
    *lines, count, note = process(*arguments, cache=tmp_path).splitlines()
    assert [line.split()[:5] for line in lines] == [[name, "sm_90", "float16", "320", "pixels"] for name in HD_KERNELS]
    assert all(line.endswith(" s") for line in lines)
    assert (
        count == f"11 kernels in {tmp_path}: 11 compiled now, 0 were there" and "launchers in C are still built" in note
    )
    # A second run compiles nothing, either.
    assert all(line.endswith(" cached") for line in process(*arguments, cache=tmp_path).splitlines()[:11])
    # The last two cases need other kernels; otherwise the counts of the first two would mean nothing. The kernels of
    # resizing are the same for all dtypes.
    cases = [{}, {"batch": 8}, {"dtype": "bfloat16"}, {"training": True}]
    assert launch(folder, tmp_path, *cases) == [(11, 0), (11, 0), (2, 9), (11, 2)]


@pytest.mark.slow
@needs_triton
def test_training_and_several_architectures(tmp_path):
    folder = OWN_GOLDEN / "standard"
    arguments = ("--arch", "sm_90", "--arch", "sm_80", "--dtype", "bfloat16", "--training", "--model", folder)
    # Mining on sm_90 has a kernel more, which goes over the pyramid.
    assert len(process("-m", "mg_fast", "compile", *arguments, cache=tmp_path).splitlines()) == 11 + 10 + 2
    assert launch(folder, tmp_path, {"architecture": 80, "dtype": "bfloat16", "training": True}) == [(10, 0)]


@pytest.mark.slow
@needs_triton
def test_all_kernels(tmp_path):
    """Kernels in whose place `auto` runs a library are compiled, too, for few pictures and for many.

    The products of many pictures have other tiles.
    """
    folder = OWN_GOLDEN / "standard"
    arguments = ("--arch", "sm_90", "--dtype", "float16", "--backend", "triton", "--model", folder)
    lines = process("-m", "mg_fast", "compile", *arguments, cache=tmp_path).splitlines()[:-2]
    assert all(line.split()[1:4] == ["sm_90", "float16", "160"] for line in lines)
    # The folder holds exactly the kernels that were reported as compiled, for that architecture.
    compiled = sorted(line.split()[0] for line in lines if line.endswith(" s"))
    assert sorted(path.stem for path in tmp_path.rglob("*.cubin")) == compiled
    assert {name: compiled.count(name) for name in compiled} == {
        "dwconv_bands_fwd_kernel": 2,
        "dwconv_norm_fwd_kernel": 2,
        # More than one for each of the four stages, because products of few rows have other tiles.
        "linear_gelu_fwd_kernel": 5,
        "linear_residual_fwd_kernel": 5,
        "pixel_fields_fwd_kernel": 1,
        "pixel_norm_fwd_kernel": 2,
        "pool_coarse_fwd_kernel": 1,
        "resize_columns_fwd_kernel": 1,
        "resize_rows_fwd_kernel": 1,
    }
    made = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json") if not path.name.startswith("__grp__")]
    assert sorted(entry["name"] for entry in made) == compiled and {entry["target"]["arch"] for entry in made} == {90}
    found = launch(folder, tmp_path, *({"backend": "triton", "batch": batch} for batch in (1, 8, 64)))
    assert found == [(2 + 6 + 8 + 2, 0)] * 3


@pytest.mark.slow
@needs_triton
def test_the_first_launches_of_an_interleaved_model_compile_nothing(tmp_path):
    pytest.importorskip("diffusers")
    out = process("-c", LAUNCH_INTERLEAVED, cache=tmp_path)
    names, hits, misses = json.loads(out.splitlines()[-1])
    assert names == ["deformable_attention_fwd_kernel", "feature_sync_fwd_kernel"]
    assert hits >= 2 + 1 + 4 and misses == 0


@needs_triton
def test_the_published_sizes():
    from mg_fast.models.mini_gemini.launches import published_configs

    standard, hd = published_configs()
    for config in (standard, hd):
        assert config.tokens_per_view == 576 and config.vision_config_aux["dims"] == [192, 384, 768, 1536]
    assert (standard.image_size_aux, standard.image_grid, standard.views) == (768, 1, 1)
    assert (hd.image_size_aux, hd.image_grid, hd.views) == (1536, 2, 5)


# ---- errors


def failed(capsys, *arguments):
    code = cli.main(["compile", "--arch", "sm_90", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return code, err.removeprefix("mg-fast: error: ").strip()


def test_triton_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert failed(capsys) == (6, "kernels cannot be compiled: triton is not installed (it is published for Linux only)")


@needs_triton
def test_errors(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert failed(capsys) == (
        6,
        "kernels cannot be compiled: TRITON_INTERPRET=1 is set, under which kernels are interpreted: unset it",
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    code, message = failed(capsys, "--model", tmp_path)
    assert code == 3 and message.startswith(f"{tmp_path} has no config.json")
    config = {"model_type": "mgm", "image_size_aux": 768, "mm_vision_select_layer": -2, "mm_hidden_size_aux": 1234}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, message = failed(capsys, "--model", tmp_path)
    assert code == 3 and "mm_hidden_size_aux=1234 but does not give the widths that add up to it" in message


@needs_triton
def test_a_dtype_that_only_a_checkpoint_tells(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, message = failed(capsys, "--dtype", "auto")
    assert code == 6 and message.startswith("--dtype auto is for `mg-fast warmup`")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compile"], "the following arguments are required: --arch"),
        (
            ["compile", "--arch", "sm_91"],
            "--arch: expected one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, got 'sm_91'",
        ),
        (["compile", "--arch", "90"], "expected one of sm_80"),
        (
            ["compile", "--arch", "sm_90", "--dtype", "int8"],
            "argument --dtype: expected auto, float32, bfloat16, float16",
        ),
        (["compile", "--arch", "sm_90", "--device", "cuda"], "unrecognized arguments: --device cuda"),
        (["warmup"], "the following arguments are required: --model"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compile", "warmup"])
def test_help_shows_no_option_of_the_other(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert ("--arch" in out, "--device" in out) == (command == "compile", command == "warmup")
