"""Floors from shapes, against torch's FLOP counter and floors computed by hand."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.cases.settings import DEPTHS, DIMS
from bench.costs import floors
from bench.costs.answer import MODELS, ModelledAnswer, parameters
from bench.costs.gpus import GPUS, find_gpu
from bench.costs.mining import Sizes
from bench.costs.tower import Tower
from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.models.mini_gemini.vision import build_projector, low_resolution_features
from mg_fast.testing.random_checkpoints import SIZES, make_config

H200 = GPUS["h200"].ceilings


def empty_model(size, **changes):
    with torch.device("meta"):
        return MiniGeminiForConditionalGeneration(make_config(size, **changes)).eval()


def flop_of(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_weights_of_tower_and_mining():
    model = empty_model("7b").model
    tower, mining = (sum(p.numel() for p in part.parameters()) for part in (model.vision_tower_aux, model.patch_mining))
    # In a checkpoint layer scale is a parameter of its own.
    scales = sum(depth * c for c, depth in zip(DIMS, DEPTHS))
    assert (Tower(torch.float32).weights + scales, Sizes(torch.float32).weights) == (tower, mining)


def test_bytes_of_weights():
    """7B: Vicuna has 6,738 million parameters, both towers and the rest 530 million."""
    assert ModelledAnswer("7b").weight_bytes == pytest.approx(2 * 7.27e9, rel=0.01)
    assert ModelledAnswer("7b-hd").weight_bytes == ModelledAnswer("7b").weight_bytes
    assert ModelledAnswer("2b", "float32").weight_bytes == 4 * parameters("2b")


@pytest.mark.parametrize("model", ["7b", "7b-hd"])
def test_flop_of_clip_and_projector(model):
    answer = ModelledAnswer(model, batch=2)
    tower = empty_model("7b").model.vision_tower
    views = torch.empty(2 * answer.views, 3, 336, 336, device="meta")
    assert flop_of(lambda: low_resolution_features(tower, views, backend="torch")) == answer.clip_cost.flop
    with torch.device("meta"):
        projector, features = build_projector("mlp2x_gelu", 1024, 4096), torch.empty(2, answer.image_tokens, 1024)
    assert flop_of(lambda: projector(features)) == answer.projector_cost.flop


class Small(ModelledAnswer):
    """An answer by one of the small random models."""

    def __post_init__(self):
        pass


@pytest.mark.parametrize("size", ["tiny", "tiny-gemma", "tiny-mixtral"])
def test_flop_of_the_language_model(size):
    """The model runs with numbers, because Mixtral's routing needs them.

    Of torch's attentions the counter sees only the eager one, which computes the whole square.
    """
    answer = Small(size, "float32", batch=2, text_tokens=39)
    model = MiniGeminiForConditionalGeneration(answer.config).eval()
    model.set_attn_implementation("eager")
    if size == "tiny-mixtral":
        model.set_experts_implementation("eager")
    text, rows, tokens = answer.config.text_config, 2 * answer.prompt_tokens, answer.prompt_tokens
    ids = torch.ones(2, tokens, dtype=torch.long)
    square = 4 * rows * tokens * text.num_attention_heads * floors.head_width(text) * text.num_hidden_layers
    counted = flop_of(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False))
    # The rest of the FLOP belongs to the rotation by positions.
    assert answer.prefill_cost.flop + square // 2 == pytest.approx(counted, rel=1e-3)
    cache = model(input_ids=ids, logits_to_keep=1).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == rows * floors.cache_bytes_per_token(text, 4)
    counted = flop_of(lambda: model(input_ids=ids[:, :1], past_key_values=cache, logits_to_keep=1))
    assert answer.decode_cost(tokens + 1).flop == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize(
    "model, first_token_ms, prefill_ms, tokens_per_second",
    [
        # Floors of an H200 at 4.3 TB/s and 790 TFLOP/s, computed by hand for 64 text tokens.
        ("7b", 12.3, 10.6, 317),
        ("7b-hd", 58, 51.1, None),
        ("2b", 5.0, 3.3, 856),
        ("2b-hd", 22.7, 15.6, None),
        ("8b", None, 11.4, 285),
        ("13b", None, 20.8, 164),
        ("34b-hd", None, 258.9, None),
    ],
)
def test_known_floors(model, first_token_ms, prefill_ms, tokens_per_second):
    answer = ModelledAnswer(model, new_tokens=1)
    assert answer.stages[-1].floor_ms(H200, "bfloat16") == pytest.approx(prefill_ms, rel=0.02)
    if first_token_ms:
        assert answer.first_token_ms(H200) == pytest.approx(first_token_ms, rel=0.05)
    if tokens_per_second:
        assert answer.tokens_per_second(H200) == pytest.approx(tokens_per_second, rel=0.01)


def test_floor_is_the_larger_of_both():
    stages = {stage.name: stage for stage in ModelledAnswer("7b").stages}
    mining, projector = stages["patch info mining"], stages["projector"]
    assert (mining.bound(H200, "bfloat16"), projector.bound(H200, "bfloat16")) == ("compute", "compute")
    assert ModelledAnswer("7b").decode.bound(H200, "bfloat16") == "bandwidth"
    assert mining.floor_ms(H200, "bfloat16") == pytest.approx(1e3 * mining.cost.flop / 790e12)
    assert stages["preprocess"].floor_ms(H200, "bfloat16") == pytest.approx(
        1e3 * stages["preprocess"].cost.bytes / 4.3e12
    )


def test_experts():
    """One token reads two of eight experts; a prompt reads all of them, and each token is multiplied with two."""
    answer = ModelledAnswer("8x7b")
    experts = 2 * answer.config.text_config.num_hidden_layers * 8 * 3 * 4096 * 14336
    assert answer.decode_cost(1).bytes == pytest.approx(experts / 4, rel=0.15)
    assert answer.prefill_cost.bytes == pytest.approx(experts, rel=0.05)
    assert ModelledAnswer("8x7b", batch=4).decode.cost.bytes > 2 * answer.decode.cost.bytes


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_and_model(gpu, capsys):
    for model in MODELS:
        assert main(["roofline", "--gpu", gpu, "--model", model]) == 0
    out = capsys.readouterr().out
    assert not re.search(r"\b(nan|inf)\b", out)
    # A 34B model in bfloat16 takes 70 GB.
    assert out.count("DOES NOT FIT") >= 2 or find_gpu(gpu).memory_gb > 90


def test_a_deployers_table(capsys):
    assert main(["roofline", "--gpu", "h200", "--model", "7b-hd"]) == 0
    out = capsys.readouterr().out
    assert "2880 image and 64 text tokens" in out and "reached on one card: 4.30 TB/s, 790 TFLOP/s" in out
    assert "mining by the original's steps: 2181 GFLOP and 23.8 GB" in out
    assert "time to first token: at least 57.8 ms" in out and "fits into 141 GB" in out
    main(["roofline", "--model", "7b", "--gpu", "l40s"])
    out = capsys.readouterr().out
    assert "mining by the original's steps: 436 GFLOP" in out and "the data sheet's, which no program reaches" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "h300"], "no GPU is called 'h300': expected one of a100-40, a100-80, h100, h200, b200, l40s, 4090"),
        (["--model", "70b"], "no model is called '70b': expected one of 2b, 2b-hd, 7b, 7b-hd"),
        (["--dtype", "int4"], "no dtype is called 'int4': expected one of bfloat16, float16, float32"),
        (["--batch", "0"], "batch: expected a whole number above 0, got 0"),
        (["--measured", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_what_is_not_there_is_one_line(words, said, capsys):
    assert main(["roofline", *words]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("bench: ")
        and captured.err.count("\n") == 1
        and said in captured.err
        and not captured.out
    )


def test_beside_measurements(tmp_path, capsys):
    row = {"p20_ms": None, "p80_ms": None, "peak_mib": None, "first_call_ms": None, "why": None}
    rows = [
        row | {"name": "patch_mining/1536-hd-b1-bfloat16", "provider": name, "ok": ok, "median_ms": ms}
        for name, ok, ms in (("reference", True, 9.0), ("torch", True, 0.5), ("triton", False, 0.1))
    ]
    answer = {"name": "end-to-end/7b-hd-first-token-b1-bfloat16", "provider": "auto", "ok": True, "median_ms": 80.0}
    rows.append(
        row | answer | {"stages": [{"name": "HR tower", "ms": 5.0}, {"name": "prefill to first token", "ms": 71.5}]}
    )
    document = dict.fromkeys(("date", "cpu", "threads", "torch", "commit")) | {"device": "cuda", "gpu": "NVIDIA H200"}
    document |= {"ceilings": {"copy_gbps": 4000, "matmul_tflops": {"bfloat16": 700}}, "cases": rows}
    (tmp_path / "all.json").write_text(json.dumps(document))
    assert main(["roofline", "--model", "7b-hd", "--measured", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "measured on NVIDIA H200: 4.00 TB/s, 700 TFLOP/s" in out
    # The fastest right provider is shown.
    assert "0.500 torch" in out and "triton" not in out
    # The stage that has no case of its own comes from a whole answer.
    assert "71.500 auto" in out and "5.000" not in out
    assert main(["roofline", "--dtype", "float32", "--measured", str(tmp_path)]) == 2
    (tmp_path / "all.json").write_text(json.dumps(document | {"device": "cpu"}))
    assert main(["roofline", "--measured", str(tmp_path)]) == 2
    assert "expected documents measured on a GPU" in capsys.readouterr().err


def test_sizes_are_the_checkpoints():
    assert {model.removesuffix("-hd") for model in MODELS} == {
        size for size in SIZES if not size.startswith("tiny") and size not in ("demo", "0.5b")
    }
