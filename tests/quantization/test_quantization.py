"""Quantized language models: what is rounded and how far, how many bytes it takes, and what is refused.

Refusals come before any weight is read.
"""

import copy
import importlib.util
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import mg_fast
from mg_fast import BackendError, CheckpointError, MiniGeminiForConditionalGeneration, cli, quantization
from mg_fast.quantization import Int8Linear, check_config, products, quantized_experts, tensor_bytes, weight_bytes
from mg_fast.testing.tolerances import relative_error
from tests.checkpoints import load, probe, remake

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

LAYERS = "model.language_model.layers."
# torchao has no int4 for Mixtral's fused experts.
CASES = [
    (kind, name)
    for kind in ("llama", "gemma", "hd", "mixtral")
    for name in quantization.NAMES
    if (kind, name) != ("mixtral", "int4")
]
LINEAR = pytest.mark.parametrize("name", quantization.NAMES)


def effective(weight: torch.Tensor) -> torch.Tensor:
    """The float32 matrix that a quantized weight stands for, found by its products with the unit vectors."""
    if weight.dim() == 3:
        return weight.qdata.float() * weight.scale
    return F.linear(torch.eye(weight.shape[1]), weight).T


def is_quantized(parameter: torch.Tensor) -> bool:
    return type(parameter.data) is not torch.Tensor


@pytest.fixture(scope="module")
def quantized(built):
    """A function from (kind, name) to the quantized model and the original one, in float32."""
    models = {}

    def get(kind, name):
        if (kind, name) not in models:
            models[kind, name] = load(built[kind], quantization_config=name), load(built[kind])
        return models[kind, name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", CASES)
def test_only_the_layers_matrices_are_quantized(quantized, kind, name):
    model, plain = quantized(kind, name)
    for key, parameter in model.named_parameters():
        router = key.endswith(".mlp.gate.weight")
        if key.startswith(LAYERS) and parameter.dim() > 1 and not router:
            assert is_quantized(parameter), f"{key} was not quantized"
        else:
            assert not is_quantized(parameter) and torch.equal(parameter, plain.get_parameter(key)), (
                f"{key} was touched"
            )


@pytest.mark.parametrize("kind, name", CASES)
def test_weights_are_rounded_by_half_a_step_at_most(quantized, kind, name):
    model, plain = quantized(kind, name)
    for key, parameter in model.named_parameters():
        if not is_quantized(parameter):
            continue
        weight = plain.get_parameter(key).detach()
        error = (effective(parameter) - weight).abs()
        largest = weight.abs().amax(-1, keepdim=True)
        if name == "int8":
            # There are 255 levels from -127 to 127. torchao's scale is the row's largest value over 127.5, so that
            # value is cut by half a step.
            step, bound = largest / 127.5, 0.5
        elif name == "fp8":
            # With 3 bits of mantissa, half of the last one is 2^-4 of the value. Below 2^-6 of the scale, steps are
            # 2^-9 of it.
            step, bound = torch.maximum(weight.abs() / 8, largest / 448 * 2**-9), 0.5
        else:
            groups = weight.unflatten(-1, (-1, 32))
            step, bound = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(32, -1), 0.5
        assert (error <= bound * step * 1.001 + 1e-7).all(), f"{key}: {(error / step).max():.3f} steps"
        assert error.max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", CASES)
def test_it_is_the_plain_model_with_rounded_weights(quantized, built, kind, name):
    """Only the weights are rounded: the plain float32 model with the same rounded weights gives the same logits.

    They agree up to the rounding of float32.
    """
    model, plain = quantized(kind, name)
    rounded = load(built[kind])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_quantized(parameter):
                rounded.get_parameter(key).copy_(effective(parameter))
    (tokens, logits), (same_tokens, same_logits), (plain_tokens, plain_logits) = (
        probe(model),
        probe(rounded),
        probe(plain),
    )
    assert torch.equal(tokens, plain_tokens) and torch.equal(tokens, same_tokens)
    assert relative_error(logits, same_logits) < 1e-4
    assert relative_error(logits, plain_logits) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind, name", [case for case in CASES if case[0] != "hd"])
def test_greedy_answers(built, photo, kind, name, dtype):
    pipeline = mg_fast.load(built[kind], quantize=name, dtype=dtype, device="cpu", template="vicuna_v1")
    for question, pictures in (("What?", [photo]), ("And?", [])):
        assert len(pipeline.chat(question, pictures, max_new_tokens=6, eos_token_id=-1).token_ids) == 6
    assert pipeline.model.dtype == dtype
    assert {p.dtype for p in pipeline.model.model.vision_tower.parameters()} == {dtype}


# ---- Products that torchao lacks.


def int8_linear(*, features=(96, 64), bias=False, dtype=torch.bfloat16, outlier=1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(features[0], features[1], bias=bias, dtype=dtype))
    layer[0].weight.data *= outlier
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    layer[0].__class__ = Int8Linear
    return layer[0]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows, packed", [(1, True), (4, True), (5, False), (64, False)])
def test_few_bfloat16_rows_take_torchs_kernel(monkeypatch, rows, packed, bias):
    layer, calls = int8_linear(bias=bias), []
    kernel = products._packed_product
    monkeypatch.setattr(products, "_packed_product", lambda *args: calls.append(1) or kernel(*args))
    x = torch.randn(1, rows, 96).bfloat16()
    with torch.inference_mode():
        y = layer(x)
    assert bool(calls) == packed and y.shape == (1, rows, 64) and y.dtype == torch.bfloat16
    exact = x.double() @ (layer.weight.qdata.double() * layer.weight.scale.double()).T + (
        layer.bias.double() if bias else 0
    )
    # The sum, the scale, their product and the sum with the bias are each rounded to bfloat16.
    assert relative_error(y, exact) < 4 * 2**-8


def test_float16_products_stay_in_range():
    """Small float16 results are finite.

    Unscaled int8 sums are 127 times too large for float16, so torchao's own product gives infinities here.
    """
    layer = int8_linear(features=(2048, 64), dtype=torch.float16)
    x = torch.full((3, 2048), 4.0, dtype=torch.float16) * torch.sign(layer.weight.qdata[0].half())
    torchao_product = F.linear(x, layer.weight)
    assert torchao_product.isinf().any(), "torchao now scales before it sums: Int8Linear is no longer needed for this"
    exact = x.double() @ (layer.weight.qdata.double() * layer.weight.scale.double()).T
    assert exact.abs().max() < 1000 and relative_error(layer(x), exact) < 2**-9


def test_gradients_pass_through_int8():
    layer = int8_linear()
    x = torch.randn(1, 96).bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    exact = (layer.weight.qdata.double() * layer.weight.scale.double()).sum(0)
    assert relative_error(x.grad[0], exact) < 4 * 2**-8


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_experts_are_the_plain_experts(quantized, name, tokens):
    """Experts agree with transformers' own loop over the weights that the quantized ones stand for.

    They are gathered for a few tokens, and run one by one for many.
    """
    model, plain = quantized("mixtral", name)
    ours, theirs = (m.model.language_model.layers[0].mlp.experts for m in (model, plain))
    torch.manual_seed(tokens)
    x, scores = torch.randn(tokens, ours.hidden_dim), torch.rand(tokens, 2)
    index = torch.stack([torch.randperm(ours.num_experts)[:2] for _ in range(tokens)])
    expected = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(tokens) for k in range(2)):
        gate_up, down = (effective(w)[index[t, k]] for w in (ours.gate_up_proj, ours.down_proj))
        gate, up = (gate_up @ x[t]).chunk(2)
        expected[t] += scores[t, k] * (down @ (F.silu(gate) * up))
    with torch.inference_mode():
        assert relative_error(quantized_experts(ours, x, index, scores), expected) < 1e-5
        assert relative_error(ours(x, index, scores), expected) < 1e-5
    assert relative_error(theirs(x, index, scores).detach(), expected) > 1e-4


def test_what_a_configuration_leaves_is_said(built, caplog):
    """The log names what a configuration for Linear layers passes over: a Mixtral's experts, most of its weights."""
    with caplog.at_level(logging.WARNING, "mg_fast"):
        model = load(
            built["mixtral"], quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        )
    left = sum(
        tensor_bytes(p)
        for n, p in model.named_parameters()
        if n.startswith(LAYERS) and p.dim() > 1 and not is_quantized(p)
    )
    assert left == 2 * 4 * (4 * (192 * 64 + 64 * 96) + 4 * 64)
    [message] = [record.getMessage() for record in caplog.records if "are not quantized" in record.getMessage()]
    assert message.startswith(f"{left / 1e6:.1f} MB of the language model's layers") and "fused experts" in message
    caplog.clear()
    load(built["mixtral"], quantization_config="int8")
    assert "are not quantized" not in caplog.text


@pytest.mark.parametrize("kind", ["llama", "bfloat16"])
def test_what_is_slow_on_a_cpu_is_said(built, caplog, kind):
    for name in quantization.NAMES:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mg_fast"):
            load(built[kind], quantization_config=name)
        assert ("on a CPU saves memory and costs time" in caplog.text) == (kind == "llama" or name == "fp8")


# ---- Saved and loaded.


@pytest.mark.parametrize("kind, name", [case for case in CASES if case[1] != "int4"])
def test_round_trip_and_bytes(quantized, kind, name, tmp_path):
    model, _ = quantized(kind, name)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(probe(again), probe(model)))
    # The file holds what is in memory, except for buffers that are never saved.
    tensors = load_file(tmp_path / "model.safetensors")
    vision = ("model.vision", "model.vlm_uni", "model.mm_projector")
    stored = {True: 0, False: 0}
    for key, tensor in tensors.items():
        stored[key.startswith(vision)] += tensor.numel() * tensor.element_size()
    for key, buffer in model.named_buffers():
        stored[not key.startswith("model.language_model")] += buffer.numel() * buffer.element_size()
    counted = weight_bytes(model)
    assert (counted.language_model, counted.vision) == (stored[False], stored[True])
    assert weight_bytes(again) == counted


def test_int8_numbers_of_a_mapped_file_are_aligned(quantized):
    """They may begin at any multiple of 8 bytes in a file, where torch's kernel for a CPU would crash."""
    model = copy.deepcopy(quantized("llama", "int8")[0])
    layer = model.model.language_model.layers[0].mlp.up_proj
    numbers = layer.weight.qdata
    room = torch.empty(numbers.numel() + 64, dtype=torch.int8)
    start = -room.data_ptr() % 64 + 8
    layer.weight.qdata = room[start : start + numbers.numel()].view_as(numbers).copy_(numbers)
    layer.__class__ = torch.nn.Linear
    assert layer.weight.qdata.data_ptr() % 16 == 8
    quantization.finish(model)
    assert layer.weight.qdata.data_ptr() % 16 == 0 and torch.equal(layer.weight.qdata, numbers)


def test_int4_on_a_cpu_cannot_be_saved(quantized, tmp_path):
    with pytest.raises(BackendError, match="int4 weights packed for a CPU cannot be saved"):
        quantized("llama", "int4")[0].save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_twice(quantized, tmp_path, standard):
    remake(standard, tmp_path)
    quantized("llama", "int8")[0].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quantized already.*cannot be quantized by 'fp8' again"):
        mg_fast.load(tmp_path, quantize="fp8", device="cpu")


@pytest.mark.parametrize("kind, name", CASES)
def test_bytes_are_those_of_the_inner_tensors(quantized, kind, name):
    model, plain = quantized(kind, name)
    counted, before = weight_bytes(model), weight_bytes(plain)
    layers = 0
    for key, parameter in model.named_parameters():
        if is_quantized(parameter):
            # int8 and fp8 have a float32 scale for each row, int8 also a zero point. int4 has half a byte for each
            # weight, and a scale and a zero point for every 32 weights.
            rows, count = parameter.shape[:-1].numel(), parameter.numel()
            stored = {"int8": count + 5 * rows, "fp8": count + 4 * rows, "int4": count // 2 + count // 32 * 8}[name]
            assert tensor_bytes(parameter) == stored, key
            layers += 4 * count - stored
    assert layers > 0 and before.language_model - counted.language_model == layers
    assert counted.vision == before.vision and counted.unquantized == before.unquantized == before.language_model
    assert counted.formats == (name,) and before.formats == ()


def test_shared_weights_count_once(quantized):
    _, plain = quantized("gemma", "int8")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    counted = weight_bytes(plain)
    total = sum(p.numel() * 4 for p in plain.parameters()) + sum(b.numel() * b.element_size() for b in plain.buffers())
    assert counted.language_model + counted.vision == total


def test_bytes_in_words():
    some = quantization.WeightBytes(6_900_000_000, 1_249_000_000, 13_500_000_000, ("int8",))
    assert str(some) == "language model 6.9 GB (int8; 13.5 GB unquantized), vision 1.2 GB"
    assert str(quantization.WeightBytes(8_000_000, 500_000, 8_000_000, ())) == "language model 8.0 MB, vision 0.5 MB"


def test_command_line(standard, photo, capsys):
    arguments = [
        "run",
        "--model",
        str(standard),
        "--device",
        "cpu",
        "--image",
        str(photo),
        "--prompt",
        "What?",
        "--max-new-tokens",
        "2",
    ]
    documents = []
    for extra in ([], ["--quantize", "int8"]):
        assert cli.main([*arguments, "--json", *extra]) == 0
        out, err = capsys.readouterr()
        documents.append(json.loads(out)["weight_bytes"])
        [line] = [line for line in err.splitlines() if line.startswith("weights: language model ")]
        assert ("(int8; " in line) == bool(extra) and ", vision " in line
    plain, smaller = documents
    assert smaller["language_model"] < plain["language_model"] and smaller["vision"] == plain["vision"]


# ---- Refused before any weight is read.


@pytest.fixture
def refuse():
    """Checks that loading raises a BackendError with this message before weights are read."""

    def from_pretrained(*args, **kwargs):
        raise AssertionError("went on to load the weights")

    def refuse(folder, quantize, match, **arguments):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BackendError, match=match):
            patch.setattr(PreTrainedModel, "from_pretrained", from_pretrained)
            MiniGeminiForConditionalGeneration.from_pretrained(folder, quantization_config=quantize, **arguments)

    return refuse


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith(package) else find(name, *rest)
    )


def gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capabilities[torch.device(device).index or 0]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")


def test_unknown_names(refuse, standard):
    refuse(standard, "int2", "expected int8, int4, fp8 or a transformers quantization configuration, got 'int2'")
    refuse(standard, {"load_in_4bit": True}, "or a transformers quantization configuration, got {'load_in_4bit'")


@pytest.mark.parametrize("package, quantize", [("torchao", "int8"), ("bitsandbytes", "BitsAndBytesConfig")])
def test_missing_packages(refuse, standard, monkeypatch, package, quantize):
    config = quantize if quantize == "int8" else BitsAndBytesConfig(load_in_4bit=True)
    without(monkeypatch, package)
    refuse(standard, config, f"{quantize}.* needs {package}, which is not installed: pip install")


@LINEAR
def test_gpus(refuse, built, monkeypatch, name):
    gpus(monkeypatch, (9, 0), (7, 5))
    if name != "int8":
        needed = {"int4": "sm_80", "fp8": "sm_89"}[name]
        refuse(
            built["bfloat16"], name, f"{name} needs a GPU of {needed} or newer; Some GPU is sm_75", device_map="auto"
        )
        refuse(built["bfloat16"], name, f"{name} needs a GPU of {needed}", device_map={"": 1})
    config = quantization.named_config(name, load(built["bfloat16"]).config.text_config, "cuda:0", torch.bfloat16)
    assert name[-1] in type(config.quant_type).__name__
    if name == "int4":
        assert config.quant_type.int4_packing_format == "tile_packed_to_4d" and config.quant_type.group_size == 32


@pytest.mark.parametrize("asked", [None, "float16"])
def test_int4_on_a_gpu_is_for_bfloat16(refuse, standard, built, monkeypatch, asked):
    gpus(monkeypatch, (9, 0))
    dtype = {} if asked is None else {"dtype": asked}
    found = f"these are torch.{asked or 'float32'}: load them with dtype='bfloat16'"
    refuse(standard if asked is None else built["bfloat16"], "int4", found, device_map="cuda", **dtype)


def test_the_stored_dtype_counts_where_config_json_is_silent(refuse, built, standard, tmp_path, monkeypatch):
    gpus(monkeypatch, (9, 0))
    refuse(remake(standard, tmp_path, torch_dtype=None), "int4", "these are torch.float32", device_map="cuda")


def test_mixed_devices(refuse, standard, monkeypatch):
    gpus(monkeypatch, (9, 0))
    mixed = {"model": 0, "lm_head": "cpu"}
    refuse(
        standard,
        "int8",
        r"one kind of device, CUDA or CPU; the layers would go to \['cpu', 'cuda:0'\]",
        device_map=mixed,
    )
    refuse(standard, "int8", "one kind of device", device_map="meta")


def test_int4_needs_groups_that_divide(refuse, built):
    refuse(built["mixtral"], "int4", "int4 is not offered for fused experts")
    text = load(built["llama"]).config.text_config
    assert quantization.named_config("int4", text, "cpu", torch.float32).quant_type.group_size == 32
    text.hidden_size, text.intermediate_size = 256, 384
    text.head_dim = 64
    assert quantization.named_config("int4", text, "cpu", torch.float32).quant_type.group_size == 128
    text.intermediate_size = 328
    with pytest.raises(
        BackendError, match="groups of 128, 64, 32 weights.*256 .hidden., 256 .heads. and 328 .intermediate. wide"
    ):
        quantization.named_config("int4", text, "cpu", torch.float32)
    text.intermediate_size, text.num_key_value_heads, text.head_dim, text.num_attention_heads = 384, 1, 8, 32
    with pytest.raises(BackendError, match="outputs in multiples of 16; this model has layers of 8 outputs"):
        quantization.named_config("int4", text, "cpu", torch.float32)


@pytest.mark.parametrize("backend, package", [(None, "optimum-quanto"), ("hqq", "hqq")])
def test_quantized_cache_needs_its_package(pipeline, monkeypatch, backend, package):
    without(monkeypatch, ("optimum", "hqq"))
    config = {} if backend is None else {"cache_config": {"backend": backend, "nbits": 4}}
    for stream in (False, True):
        with pytest.raises(
            BackendError, match=f"cache_implementation='quantized'.* needs {package}, which is not installed"
        ):
            pipeline.chat("Hello.", cache_implementation="quantized", stream=stream, **config)


def test_quantized_cache_reaches_transformers(pipeline, monkeypatch):
    if importlib.util.find_spec("optimum"):
        assert len(pipeline.chat("Hello.", max_new_tokens=2, cache_implementation="quantized").token_ids) == 2
        return
    monkeypatch.setattr("mg_fast.engine.options.check_cache", lambda options: None)
    with pytest.raises(ImportError, match="KV cache quantization with optimum-quanto"):
        pipeline.chat("Hello.", max_new_tokens=2, cache_implementation="quantized")


# ---- bitsandbytes.


def test_bitsandbytes_skips_what_is_not_the_language_models(built, monkeypatch):
    monkeypatch.setattr(quantization.configuration, "_need", lambda *args: None)
    config = BitsAndBytesConfig(load_in_8bit=True)
    check_config(config)
    for kind in ("llama", "mixtral"):
        for name, module in load(built[kind]).named_modules():
            if isinstance(module, torch.nn.Linear):
                assert should_convert_module(name, config.llm_int8_skip_modules) == name.startswith(LAYERS), name
    own = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model"])
    check_config(own)
    assert own.llm_int8_skip_modules == ["model"]


# ---- Adapters.


@pytest.fixture(scope="module")
def adapter(standard, tmp_path_factory):
    """A LoRA adapter on the language model, saved by peft, and the logits that it gives."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)", init_lora_weights=False
    )
    base = load(standard)
    adapted = peft.get_peft_model(base, config)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder, probe(base)[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["load_adapter", "PeftModel"])
@pytest.mark.parametrize("quantize", [None, *quantization.NAMES])
def test_adapters_load(standard, adapter, photo, quantize, how):
    folder, adapted = adapter
    pipeline = mg_fast.load(standard, quantize=quantize, device="cpu")
    before = probe(pipeline.model)[1]
    if how == "load_adapter":
        pipeline.model.load_adapter(folder)
    else:
        import peft

        peft.PeftModel.from_pretrained(pipeline.model, folder)
    after = probe(pipeline.model)[1]
    assert relative_error(after, before) > 0.3
    # The rounding of these few wide-spread weights takes the result this far from the unquantized adapted model:
    # 0, 0.02, 0.09, 0.2.
    assert relative_error(after, adapted) <= {None: 0, "int8": 0.04, "fp8": 0.2, "int4": 0.4}[quantize]
    assert len(pipeline.chat("What?", [photo], max_new_tokens=3, eos_token_id=-1).token_ids) == 3
    assert pipeline.weights.formats == (() if quantize is None else (quantize,))


# ---- On a GPU.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@LINEAR
def test_gpu(built, name):
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89")
    model, plain = (
        load(built["bfloat16"], device_map="cuda", **kwargs) for kwargs in ({"quantization_config": name}, {})
    )
    assert all(is_quantized(p) for n, p in model.named_parameters() if n.startswith(LAYERS) and p.dim() > 1)
    assert 0 < relative_error(probe(model)[1], probe(plain)[1]) < {"int8": 0.05, "fp8": 0.2, "int4": 0.5}[name]
