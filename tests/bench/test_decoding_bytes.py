"""The bytes that a decoded token writes, with and without repeated keys, for models whose heads share keys and values.

The models have their real widths on fake GPU tensors. They are counted with one and with two layers; every further
layer adds what the second one adds.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM
from transformers.integrations import sdpa_attention

from bench.counting import Count
from bench.fake_models import DTYPE, on_gpu
from bench.registry import Cost
from mg_fast.decoding.grouped_attention import grouped
from mg_fast.decoding.model_runner import ModelRunner
from mg_fast.models.causal_lm import CausalLM
from mg_fast.testing.random_checkpoints import make_config

pytestmark = pytest.mark.skipif(
    not torch.backends.cudnn.is_available(), reason="takes a torch that is built for CUDA: no GPU"
)
# Megabytes that one token writes over a window of 2048 positions, as transformers' sdpa attends and as this project
# does, for Llama-3-8B, Yi-34B and Mixtral-8x7B. What is repeated are keys and values for every query head.
WINDOW = 2048
WRITTEN_MB = {"8b": (1085.3, 11.8), "34b": (3558.0, 34.8), "8x7b": (1097.2, 23.7)}


def head_width(config) -> int:
    return config.hidden_size // config.num_attention_heads


def cost_of_a_token(size: str, layers: int, *, as_sdpa: bool) -> Cost:
    """What a pass of one token does on a GPU, over a full window."""
    config = make_config(size).text_config
    config.num_hidden_layers = layers
    with FakeTensorMode(), torch.inference_mode():
        with unset_fake_temporarily(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval().to(DTYPE)
        runner = ModelRunner(CausalLM(on_gpu(model)))
        sequences = runner.sequences(1, WINDOW)
        assert sequences.by_graph and sequences.cache.capacity == WINDOW
        one = torch.empty(1, config.num_key_value_heads, 1, head_width(config), dtype=DTYPE, device="cuda")
        for layer in sequences.cache.layers:
            layer.lazy_initialization(one, one)
        start, last = (torch.empty(1, dtype=torch.int64, device="cuda") for _ in range(2))
        token, places = (torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((1, 1), (WINDOW,)))
        with contextlib.nullcontext() if as_sdpa else grouped(runner.language_model), Count("cuda") as count:
            runner._pass(sequences, token, places, start, last)
    return count.total


def written_mb(size: str, *, as_sdpa: bool) -> float:
    one, two = (cost_of_a_token(size, layers, as_sdpa=as_sdpa).bytes_written for layers in (1, 2))
    return (one + (make_config(size).text_config.num_hidden_layers - 1) * (two - one)) / 1e6


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """transformers asks for the generation of the GPU before it chooses the product of Mixtral's experts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("size", WRITTEN_MB)
def test_a_token_writes_no_keys_but_its_own(size):
    repeated, own = WRITTEN_MB[size]
    text = make_config(size).text_config
    written = written_mb(size, as_sdpa=False)
    # transformers 5.24 writes less between the products of the experts.
    assert 0.75 * own < written < 1.01 * own
    if hasattr(sdpa_attention, "pack_gqa"):
        pytest.skip("this release of transformers repeats no keys where a pass is not compiled")
    found = written_mb(size, as_sdpa=True)
    assert found == pytest.approx(repeated, rel=1e-3)
    # The repeated keys and values are all of the difference, but for a token's own results.
    keys = 2 * text.num_attention_heads * WINDOW * head_width(text) * DTYPE.itemsize
    assert found - written == pytest.approx(text.num_hidden_layers * keys / 1e6, rel=1e-3)


def test_models_without_shared_keys_write_the_same():
    assert cost_of_a_token("7b", 1, as_sdpa=True) == cost_of_a_token("7b", 1, as_sdpa=False)
