"""The decode loop gives the same ids as transformers' own loop, in every order in which prompts can come.

Its memory does not grow, and nothing outdated is reused.
"""

import copy
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, LogitsProcessor, LogitsProcessorList, MistralConfig

from mg_fast import Pipeline
from mg_fast.decoding import Decoder
from mg_fast.decoding.kv_cache import KVCache
from mg_fast.models.templates import render
from mg_fast.ops.torch.pointwise import OneDNNLinear
from tests.families import OWN

QUESTIONS = ("What is written in the picture?", "And what colour is it? Say it in a few words.", "Why?")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def changeable(own):
    """A copy of the model, which a test may change."""
    return copy.deepcopy(own.model)


def by_decode_loop(model, processor, prompts, pictures=None, max_new_tokens=8, decoder=None, **options):
    """New ids by the decode loop, for prompts that are filled up on the left, and the number of reused positions."""
    decoder = decoder or Decoder(model)
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    request = decoder.request()
    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, custom_generate=request, **{"do_sample": False, **options}
    )
    return out[:, inputs["input_ids"].shape[1] :], request.reused


# --- greedy ids ---


def test_what_the_original_answered(each):
    if each.name in OWN:
        pytest.skip("the original has not answered these")
    pipeline = each.pipeline()
    for streamed in (False, True):
        for question, pictures, ids in each.recorded():
            conversation = pipeline.conversation()
            if streamed:
                # The same prompts were answered whole before this, so their keys and values are known by now.
                pieces = list(conversation.chat(question, pictures, max_new_tokens=16, stream=True))
                assert "".join(pieces) == pipeline.conversation().chat(question, pictures, max_new_tokens=16).text
            else:
                assert conversation.chat(question, pictures, max_new_tokens=16).token_ids == ids
    batch = pipeline.chat_batch(
        [(question, pictures) for question, pictures, _ in each.recorded()], max_new_tokens=16, progress=False
    )
    assert [answer.token_ids for answer in batch] == [ids for *_, ids in each.recorded()]


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_bytes", [2**30, 150_000, 0], ids=["all kept", "one kept", "none kept"])
def test_turns_equal_the_history_sent_fresh(each, kv_cache_bytes):
    """Three conversations take turns, with pictures in their first or a later turn."""
    pipeline = each.pipeline(kv_cache_bytes=kv_cache_bytes)
    first, second = each.pictures
    told, seen, previous = [[], [], []], [[], [], []], {}
    conversations = [pipeline.conversation() for _ in told]
    for turn, question in enumerate(QUESTIONS):
        for i, conversation in enumerate(conversations):
            new = (
                [[first], [first, second] if turn == 0 else [], [] if turn != 1 else [second]][i]
                if turn != 2 or i == 2
                else []
            )
            new = new if not (i == 0 and turn > 0) else []
            answer = conversation.chat(question, new, max_new_tokens=5)
            seen[i] += new
            tagged = "<image>\n" * len(new) + question
            assert answer.token_ids == each.plain([*told[i], (tagged, None)], seen[i], 5), (i, turn)
            told[i].append((tagged, answer.text.replace("<image>", "< image>")))
            if kv_cache_bytes == 2**30 and turn:
                # The last prompt is reused whole, and its answer as far as it is tokenized alike within the history.
                assert answer.cached_tokens >= previous[i]
            if not kv_cache_bytes:
                assert answer.cached_tokens == 0
            previous[i] = answer.prompt_tokens - 1
        assert pipeline.decoder.prefixes.held_bytes <= kv_cache_bytes


def test_a_shared_beginning_is_computed_once(each):
    pipeline = each.pipeline()
    first = pipeline.conversation().chat("What is it?", [each.pictures[0]], max_new_tokens=4)
    assert first.cached_tokens == 0
    second = pipeline.conversation().chat("Who made it?", [each.pictures[0]], max_new_tokens=4)
    # The beginning of the template and the whole picture are reused.
    assert second.cached_tokens > second.image_tokens > 0
    assert second.token_ids == each.plain([("<image>\nWho made it?", None)], [each.pictures[0]], 4)
    # With another picture and the same words, only the positions before the picture are reused.
    third = pipeline.conversation().chat("What is it?", [each.pictures[1]], max_new_tokens=4)
    assert third.cached_tokens < second.cached_tokens - second.image_tokens + 1
    assert third.token_ids == each.plain([("<image>\nWhat is it?", None)], [each.pictures[1]], 4)
    # The very same request reuses all positions but the last, whose logits are needed.
    again = pipeline.conversation().chat("What is it?", [each.pictures[0]], max_new_tokens=4)
    assert again.cached_tokens == again.prompt_tokens - 1 and again.token_ids == first.token_ids


@pytest.mark.slow
def test_ragged_batches(each):
    """Rows of a batch are filled up on the left, some have pictures, and they end at different tokens."""
    texts = ["<image>\n" + QUESTIONS[0], "Hi.", "<image>\n<image>\nCompare these two, please, and be brief about it."]
    prompts = [render(each.processor.template, [(text, None)]) for text in texts]
    pictures = [each.pictures[0], *each.pictures]
    alone = [
        each.plain([(text, None)], pictures[:1] if i == 0 else [] if i == 1 else each.pictures, 10)
        for i, text in enumerate(texts)
    ]
    eos = alone[0][3]
    for options in ({}, {"eos_token_id": [eos, alone[2][6]], "pad_token_id": 0}):
        inputs = each.processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
        width = inputs["input_ids"].shape[1]
        expected = each.model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)[:, width:]
        assert torch.equal(by_decode_loop(each.model, each.processor, prompts, pictures, 10, **options)[0], expected)
        if not options:
            # After the end of a row there is filling.
            assert [row[: len(ids)] for row, ids in zip(expected.tolist(), alone)] == alone


@pytest.mark.slow
def test_products_by_onednn(each, monkeypatch):
    """The answers stay the same where oneDNN computes the products, which normally needs larger layers than these."""
    monkeypatch.setattr("mg_fast.ops.torch.pointwise._FEWEST_WEIGHTS", 1)
    pipeline = Pipeline(copy.deepcopy(each.model), each.processor)
    assert any(type(part) is OneDNNLinear for part in pipeline.model.modules())
    first = pipeline.chat("What is it?", [each.pictures[0]], max_new_tokens=8)
    second = pipeline.chat("And now?", max_new_tokens=8)
    asked = ("<image>\nWhat is it?", None)
    assert first.token_ids == each.plain([asked], each.pictures[:1])
    assert second.token_ids == each.plain([(asked[0], first.text), ("And now?", None)], each.pictures[:1])


def test_attention_that_slides(own):
    """Where the window is shorter than the prompt, all keys and values are kept, and the mask follows the window."""
    config = MistralConfig(
        **{
            name: getattr(own.model.config.text_config, name)
            for name in ("vocab_size", "hidden_size", "intermediate_size")
        },
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        sliding_window=16,
    )
    torch.manual_seed(0)
    model = copy.deepcopy(own.model)
    model.config.text_config = model.model.config.text_config = config
    model.model.language_model = AutoModel.from_config(config).eval()
    decoder, generator = Decoder(model), torch.Generator().manual_seed(0)
    for rows, length in ((1, 5), (1, 30), (1, 70), (2, 40)):
        ids = torch.randint(3, 400, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[: rows - 1, :13] = 0
        options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected = model.generate(**options)
        for _ in range(2):
            assert torch.equal(model.generate(**options, custom_generate=decoder.request()), expected)


# --- sampling ---


class Only(LogitsProcessor):
    """Leaves a few tokens, whose probabilities are even enough for all of them to be drawn."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


SAMPLING = [
    dict(temperature=1.0),
    dict(temperature=0.6),
    dict(temperature=1.7, top_p=0.8),
    dict(temperature=1.2, top_k=5),
    dict(temperature=1.0, repetition_penalty=1.5, top_k=7),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_distribution_of_samples(own, options):
    """The first two new tokens of 4,000 rows follow their exact probabilities.

    Chi-square has at most 11 degrees of freedom. If the seeds were not fixed, it would exceed 40 with a probability of
    at most 4e-5.
    """
    tokens, rows = list(range(60, 84, 2)), 4000
    ids = own.processor(text="What is it? What", return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[60, 64]])], dim=1)
    settings = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        **options,
        "logits_processor": LogitsProcessorList([Only(tokens)]),
    }
    torch.manual_seed(5)
    drawn = []
    for _ in range(4):
        batch = ids.expand(rows // 4, -1)
        out = own.model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=2,
            custom_generate=Decoder(own.model).request(),
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
        drawn.append(out[:, ids.shape[1] :])
    drawn = torch.cat(drawn)
    # The exact probabilities come from one plain pass over each possible first token, in double precision.
    first = probabilities(own.model, ids, options, tokens)
    exact = torch.zeros(len(first), dtype=torch.float64)
    for token in first.nonzero().flatten().tolist():
        exact += first[token] * probabilities(
            own.model, torch.cat([ids, torch.tensor([[token]])], dim=1), options, tokens
        )
    for position, expected in ((0, first), (1, exact)):
        counts = torch.bincount(drawn[:, position], minlength=len(expected)).double()
        possible = expected > 0
        assert counts[~possible].sum() == 0
        # Cells that are too small for the approximation are taken together.
        large = expected * rows >= 5
        cells = [
            (counts[large], expected[large] * rows),
            (counts[~large].sum()[None], expected[~large].sum()[None] * rows),
        ]
        chi = sum(((seen - wanted) ** 2 / wanted.clamp(min=1)).sum().item() for seen, wanted in cells)
        assert chi < 40, (position, chi)


@torch.inference_mode()
def probabilities(model, ids, options, tokens):
    """Probabilities [vocabulary] in float64, by definition, with the options in transformers' order."""
    scores = model(input_ids=ids).logits[0, -1].double()
    if penalty := options.get("repetition_penalty"):
        seen = ids[0].unique()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    only = torch.full_like(scores, -torch.inf)
    only[tokens] = scores[tokens]
    scores = only / options["temperature"]
    if top_k := options.get("top_k"):
        scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
    if top_p := options.get("top_p"):
        ordered, order = scores.softmax(-1).sort(descending=True)
        scores[order[ordered.cumsum(-1) - ordered >= top_p]] = -torch.inf
    return scores.softmax(-1)


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_same_seed_draws_the_same(own, options):
    prompts = [
        render(own.processor.template, [(text, None)])
        for text in ("Hello there.", "Hi.", "Who are you, and why are you here?")
    ]
    inputs = own.processor(text=prompts, return_tensors="pt", padding=True)
    drawn = []
    for custom in ({}, {"custom_generate": Decoder(own.model).request()}):
        torch.manual_seed(11)
        drawn.append(
            own.model.generate(**inputs, max_new_tokens=20, do_sample=True, **{"top_k": 0, **options}, **custom)
        )
    assert torch.equal(*drawn)


# --- memory, and the host ---


def live():
    """The bytes of all tensors that Python can reach, with each storage counted once, and all caches."""
    gc.collect()
    tensors, caches = {}, []
    for x in gc.get_objects():
        # `type` is used because asking an object for its class can run its own code. Fake tensors have no memory.
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu":
            tensors[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif type(x) is KVCache:
            caches.append(x)
    return sum(tensors.values()), caches


@pytest.mark.slow
def test_a_thousand_tokens_take_no_more_memory(own):
    pipeline = own.pipeline(kv_cache_bytes=500_000)
    sizes, taken = [], []

    def watch(ids, scores):
        if ids.shape[1] in (300, 1100):
            size, caches = live()
            sizes.append(size)
            taken.extend(cache.nbytes for cache in caches if cache.length)
        return torch.zeros(len(ids), dtype=torch.bool)

    pipeline.chat("Hello?", max_new_tokens=1000, min_new_tokens=1000, stopping_criteria=[watch])
    assert len(sizes) == 2 and max(sizes) - min(sizes) < 20_000
    # There is one cache, whose size does not change.
    assert len(set(taken)) == 1 and len(taken) == 2
    pipeline.reset()
    before = live()[0]
    for _ in range(2):
        pipeline.chat("Hello?", max_new_tokens=200, min_new_tokens=200)
        pipeline.reset()
    assert live()[0] - before <= 500_000 and pipeline.decoder.prefixes.held_bytes <= 500_000


class Asked(TorchDispatchMode):
    """Counts the operations for which the host would have to wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, *(dict(do_sample=True, **kind) for kind in SAMPLING)], ids=str)
def test_the_host_asks_twice_a_token(own, options):
    """The host asks only whether all is done and all is finite; a GPU has copied both to pinned memory by then."""
    prompt = render(own.processor.template, [("Hello?", None)])
    counts = []
    for new in (4, 14):
        with Asked() as asked:
            by_decode_loop(own.model, own.processor, [prompt], max_new_tokens=new, **{"min_new_tokens": new, **options})
        counts.append(len(asked.names))
    assert counts[1] - counts[0] <= 2 * 10


def test_as_much_is_kept_as_the_longest_conversation_has(own, monkeypatch):
    text = own.model.config.text_config
    assert Decoder(own.model).prefixes.limit == 2**30
    monkeypatch.setattr("mg_fast.decoding.loop.LEAST_BYTES", 1)
    cache = own.pipeline()
    cache.chat("How many?", max_new_tokens=4)
    [segment] = cache.decoder.prefixes.longest(
        own.processor.encode(render(own.processor.template, [("How many?", None)]))[0]
    )[1]
    one = sum(tensor.nbytes for tensor in segment) // segment[0].shape[-2]
    assert cache.decoder.prefixes.limit == one * text.max_position_embeddings


def test_the_large_cache_of_a_batch_is_handed_back(own):
    pipeline = own.pipeline()
    pipeline.chat_batch(["How many?", "Where?"], max_new_tokens=2, progress=False)
    assert pipeline.decoder._idle is None
    pipeline.chat("How many?", max_new_tokens=2)
    assert pipeline.decoder._idle.cache.batch == 1
