"""Attention of one token over keys that groups of heads share: the numbers of transformers' `sdpa`, without copies."""

import copy
import threading

import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mg_fast.decoding import Decoder, grouped_attention, loop, model_runner
from mg_fast.decoding.grouped_attention import GROUPED, SDPA, attend, grouped, in_force
from mg_fast.models.causal_lm import CausalLM
from mg_fast.testing.tolerances import LOGITS, assert_accurate, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


class Layer(torch.nn.Module):
    """What transformers' attention functions read of a layer of attention."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


@pytest.fixture
def left_to_sdpa(monkeypatch):
    """The shapes of the queries that `attend` leaves to transformers."""
    left, whole = [], grouped_attention._sdpa

    def recorded(module, query, *given, **further):
        left.append(tuple(query.shape))
        return whole(module, query, *given, **further)

    monkeypatch.setattr(grouped_attention, "_sdpa", recorded)
    return left


@pytest.fixture
def passes_of_groups(monkeypatch):
    """The shapes of one token's queries that the grouped form is called with, where heads share keys."""
    seen, whole = [], attend

    def recorded(module, query, key, *given, **further):
        if query.shape[2] == 1 and query.shape[1] > key.shape[1]:
            seen.append(tuple(query.shape))
        return whole(module, query, key, *given, **further)

    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, recorded)
    return seen


def random_inputs(batch, heads, keys, tokens=1, width=16, length=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads + keys)
    shapes = ((batch, heads, tokens, width), (batch, keys, length, width), (batch, keys, length, width))
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    mask = torch.ones(batch, 1, tokens, length, dtype=torch.bool)
    mask[0, :, :, :7] = mask[-1, :, :, 33:] = False
    return query, key, value, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("batch, heads, keys", [(1, 8, 1), (1, 8, 2), (3, 6, 2), (2, 7, 1)])
def test_the_numbers_are_those_of_sdpa(left_to_sdpa, batch, heads, keys, additive, dtype):
    query, key, value, mask = random_inputs(batch, heads, keys, dtype=dtype)
    layer, scaling = Layer(heads // keys), 0.3
    mask = torch.where(mask, 0.0, -torch.inf).to(dtype) if additive else mask
    ours, weights = attend(layer, query, key, value, mask, scaling=scaling)
    assert not left_to_sdpa and weights is None and ours.shape == (batch, 1, heads, 16)
    plain, _ = grouped_attention._sdpa(layer, query, key, value, mask, scaling=scaling)
    exact = mask.double() if additive else mask
    oracle, _ = grouped_attention._sdpa(layer, query.double(), key.double(), value.double(), exact, scaling=scaling)
    assert_accurate(ours, plain, oracle)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 2},
        {"tokens": 3},
        {"mask": None},
        {"mask": torch.ones(1, 8, 1, 40, dtype=torch.bool)},
        {"position_bias": torch.zeros(1, 8, 1, 40)},
    ],
    ids=["no groups", "several tokens", "no mask", "a mask for each head", "a bias"],
)
def test_everything_else_is_left_to_sdpa(left_to_sdpa, change):
    heads, tokens = change.get("heads", 8), change.get("tokens", 1)
    query, key, value, mask = random_inputs(1, heads, 2, tokens)
    further = {name: value for name, value in change.items() if name == "position_bias"}
    given = Layer(heads // 2), query, key, value, change.get("mask", mask)
    found, _ = attend(*given, scaling=0.3, **further)
    assert left_to_sdpa == [(1, heads, tokens, 16)]
    assert torch.equal(found, AttentionInterface()[SDPA](*given, scaling=0.3, **further)[0])


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_scores_that_sdpa_does_not_know_either_are_left_to_it(monkeypatch, name):
    """It refuses or ignores them, as its release does."""
    monkeypatch.setattr(grouped_attention, "_sdpa", lambda *given, **further: further[name])
    assert attend(Layer(4), *random_inputs(1, 8, 2), **{name: 50.0}) == 50.0


def prompts(rows, length, filling):
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    ids[0, :filling], mask[0, :filling] = 0, 0
    return dict(input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "one key head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1})),
    "a wide window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=200)),
    "a narrow window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_plain_generate(request, name, captured, passes_of_groups):
    if captured and name == "a narrow window":
        pytest.skip("such passes are not captured")
    if captured:
        request.getfixturevalue("by_graph")
    model = made(name)
    given = prompts(2, 20, 5)
    expected = model.generate(**given)
    found = model.generate(**given, custom_generate=Decoder(CausalLM(model)).request())
    assert torch.equal(found, expected)
    # Eight passes follow the prompt, in which both layers attended to shared keys.
    assert passes_of_groups == [(2, 4, 1, 8)] * 16
    assert model.config._attn_implementation == SDPA


def test_logits_are_those_of_a_pass_without(by_graph, monkeypatch):
    model = made("llama")
    runner = Decoder(CausalLM(model)).runner
    ids = prompts(2, 20, 5)

    def logits():
        sequences = runner.sequences(2, 40)
        sequences.fill(ids["attention_mask"])
        with torch.inference_mode():
            runner.prefill(sequences, runner.model.embed_ids(ids["input_ids"]))
            return torch.stack([runner.step(sequences, torch.tensor([5 + i, 6 + i])) for i in range(4)])

    ours = logits()
    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, grouped_attention._sdpa)
    assert relative_error(ours, logits()) < LOGITS


def test_prompts_and_models_without_groups_are_left_alone(own, by_graph, monkeypatch):
    names = []
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4})).eval()
    for of in (model, own.model):
        first = of.model.layers[0] if of is model else of.model.language_model.layers[0]
        config = first.self_attn.config
        watch = first.self_attn.register_forward_pre_hook(
            lambda module, given, kwargs, config=config: names.append(
                (config.num_key_value_heads, kwargs["hidden_states"].shape[1] == 1, config._attn_implementation)
            ),
            with_kwargs=True,
        )
        decoder = Decoder(CausalLM(of) if of is model else of)
        of.generate(**prompts(2, 20, 5), custom_generate=decoder.request())
        watch.remove()
    assert set(names) == {(4, False, SDPA), (4, True, SDPA), (2, False, SDPA), (2, True, GROUPED)}


def test_a_hook_and_an_adapter_on_a_projection_count(by_graph, passes_of_groups):
    from peft import LoraConfig, inject_adapter_in_model

    model, given = made("llama"), prompts(2, 20, 5)
    seen = {tuple(model.generate(**given).flatten().tolist())}
    for change in ("hook", "adapter"):
        if change == "hook":
            for layer in model.model.layers:
                layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: out * -1.5)
        else:
            torch.manual_seed(1)
            parts = LoraConfig(
                target_modules=["q_proj", "k_proj", "v_proj"], r=4, lora_alpha=64, init_lora_weights=False
            )
            inject_adapter_in_model(parts, model)
        plain = model.generate(**given)
        passes_of_groups.clear()
        assert torch.equal(model.generate(**given, custom_generate=Decoder(CausalLM(model)).request()), plain)
        assert passes_of_groups
        seen.add(tuple(plain.flatten().tolist()))
    assert len(seen) == 3


def test_capped_scores_are_computed_as_without(by_graph, passes_of_groups, left_to_sdpa):
    """Gemma 2 caps its scores, which transformers' sdpa ignores where a release offers it for Gemma 2 at all."""
    config = Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=None)
    torch.manual_seed(0)
    model, given = Gemma2ForCausalLM(config).eval(), prompts(2, 20, 5)
    try:
        model.set_attn_implementation("sdpa")
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    expected = model.generate(**given)
    assert torch.equal(model.generate(**given, custom_generate=Decoder(CausalLM(model)).request()), expected)
    assert left_to_sdpa == passes_of_groups != []


def shared_keys():
    model = made("llama").model
    return model, model.config


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": [2, 4]},
        {"_attn_implementation": "eager"},
        "no lookup",
        "no config",
    ],
    ids=str,
)
def test_other_models_keep_their_attention(change, monkeypatch):
    model, config = shared_keys()
    if change == "no lookup":
        monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    elif change == "no config":
        model = torch.nn.Linear(2, 2)
    else:
        for name, value in change.items():
            object.__setattr__(config, name, value)
    before = config._attn_implementation
    with grouped(model):
        assert config._attn_implementation == before != GROUPED


def test_the_chosen_attention_comes_back():
    """Blocks of several threads may overlap in any order, and may end in an error."""
    model, config = shared_keys()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with grouped(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), grouped(model):
        thread.start()
        assert inside.wait(10)
        raise ZeroDivisionError
    # The other block goes on.
    assert (config._attn_implementation, in_force(config)) == (GROUPED, SDPA)
    leave.set()
    thread.join()
    assert config._attn_implementation == SDPA and not grouped_attention._running


def test_an_attention_chosen_meanwhile_is_kept():
    model, config = shared_keys()
    with grouped(model):
        config._attn_implementation = "eager"
        with grouped(model):
            assert config._attn_implementation == "eager"
    assert config._attn_implementation == "eager"


def test_a_pass_of_another_thread_does_not_change_the_state(own):
    model = copy.copy(own.model)
    before = loop._state(model)
    with grouped(model.language_model):
        assert model.text_config._attn_implementation == GROUPED and loop._state(model) == before
        assert model_runner.ModelRunner(model).graphs_refused(512) == "the language model is not on one GPU"


@pytest.mark.slow
def test_compiled_passes_repeat_nothing(own, by_graph, monkeypatch):
    """A pass that torch.compile has traced attends to the heads of a group as to tokens, and repeats no keys."""
    torch._dynamo.reset()
    shapes, compiler = set(), torch.compile

    def backend(traced, inputs):
        for node in traced.graph.nodes:
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                shapes.add(tuple(tuple(argument.meta["example_value"].shape)[:2] for argument in node.args[:3]))
        return traced.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    given, config = prompts(2, 20, 5), own.model.text_config
    decoder = Decoder(own.model, compiled=True)
    assert torch.equal(own.model.generate(**given, custom_generate=decoder.request()), own.model.generate(**given))
    heads = config.num_key_value_heads
    assert shapes == {((2, heads), (2, heads), (2, heads))} and heads < config.num_attention_heads
    torch._dynamo.reset()
