"""The decode loop when something goes wrong or changes during it.

Tests of full contexts, streams that are given up, threads, NaN, changed weights, and options.
"""

import contextlib
import copy
import gc
import threading

import pytest
import torch
from transformers import GenerationConfig

from mg_fast import Pipeline, PromptError
from mg_fast.decoding.kv_cache import KVCache
from mg_fast.models.templates import render
from tests.families import plain

QUESTION = "What is written in the picture?"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def changeable(own):
    """A pipeline over a copy of the model, which the test may change."""
    return Pipeline(copy.deepcopy(own.model), own.processor)


def live_caches():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is KVCache]


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "mg_fast-stream"]


# --- the end of the context ---


@pytest.fixture
def short(own):
    """A pipeline whose model has room for few positions."""
    model = copy.deepcopy(own.model)
    model.config.text_config.max_position_embeddings = 300
    return Pipeline(model, own.processor)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_ends_with_the_context(short, own, streamed):
    text = "word " * 15
    whole = own.pipeline().chat(text, max_new_tokens=300, eos_token_id=None)
    room = 300 - whole.prompt_tokens
    assert 30 < room < 300
    for asked in (None, 512, room + 1):
        conversation = short.conversation()
        if streamed:
            pieces = list(conversation.chat(text, max_new_tokens=asked, eos_token_id=None, stream=True))
            assert "".join(pieces) == conversation.turns[0][1]
            expected = own.processor.tokenizer.decode(
                whole.token_ids[:room], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert "".join(pieces) == expected.strip()
        else:
            answer = conversation.chat(text, max_new_tokens=asked, eos_token_id=None)
            assert answer.finish_reason == "length" and answer.prompt_tokens + len(answer.token_ids) == 300
            assert answer.token_ids == whole.token_ids[:room]
        # There is no room for another turn, and the error says so.
        with pytest.raises(PromptError, match="300 positions"):
            conversation.chat("And?" + " word" * 30)
        assert len(conversation.turns) == 1


@pytest.mark.parametrize("room", [0, 1, 2])
def test_the_last_positions(short, own, room):
    length = len(own.processor.encode(render("vicuna_v1", [("Hello.", None)]))[0])
    short.model.config.text_config.max_position_embeddings = length + room
    if room:
        answer = short.chat("Hello.", eos_token_id=None)
        assert len(answer.token_ids) == room and answer.finish_reason == "length"
    else:
        with pytest.raises(PromptError, match="at most 0 new tokens fit"):
            short.chat("Hello.")


# --- streams ---


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_stream_leaves_nothing(own, after):
    pipeline = own.pipeline(kv_cache_bytes=400_000)
    expected = pipeline.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    conversation = pipeline.conversation()
    before = len(live_caches())
    stream = conversation.chat(QUESTION, [own.pictures[0]], max_new_tokens=1500, min_new_tokens=1500, stream=True)
    for _ in range(after):
        next(stream)
    stream.close()
    assert not stream_threads() and conversation.turns == []
    del stream
    assert len(live_caches()) <= max(1, before)
    # The cache is handed back, and the next answer is as if there had been no stream.
    assert after == 0 or pipeline.decoder._idle is not None
    again = conversation.chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    assert again.token_ids == expected.token_ids and again.cached_tokens == again.prompt_tokens - 1


def test_a_dropped_stream_ends_too(own):
    stream = own.pipeline().chat(QUESTION, max_new_tokens=1500, min_new_tokens=1500, stream=True)
    next(stream)
    del stream
    gc.collect()
    assert not stream_threads()


# --- threads ---


def together(*tasks):
    """Runs tasks at once, each in a thread, and raises the first error of any of them."""
    errors, gate = [], threading.Barrier(len(tasks))

    def run(task):
        # Every thread has its own number of torch threads.
        torch.set_num_threads(1)
        gate.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_threads_on_one_conversation_take_turns(own):
    conversation = own.pipeline().conversation()
    given = {}

    def ask(name):
        def task():
            for i in range(3):
                given[f"{name}{i}?"] = conversation.chat(f"{name}{i}?", max_new_tokens=4)

        return task

    together(*(ask(name) for name in "ab"))
    texts = [question for question, _ in conversation.turns]
    assert sorted(texts) == sorted(given) and [t for t in texts if t[0] == "a"] == ["a0?", "a1?", "a2?"]
    # Each turn is the answer to exactly the turns before it.
    history = []
    for question, answer in conversation.turns:
        assert given[question].token_ids == own.plain([*history, (question, None)], [], 4)
        assert given[question].text == answer
        history.append((question, answer))


def test_threads_on_one_decoder(own):
    """Conversations in several threads answer as alone, over one model and one store that holds only a few of them.

    Some are streamed, some are answered whole, and some run in batches.
    """
    alone, pipeline = {}, own.pipeline(kv_cache_bytes=300_000)
    plans = [
        ("Hello.", []),
        (QUESTION, [own.pictures[0]]),
        ("Who made it?", [own.pictures[0]]),
        ("Compare.", list(own.pictures)),
    ]
    for text, pictures in plans:
        fresh = own.pipeline().conversation()
        alone[text] = [fresh.chat(text, pictures, max_new_tokens=6).text, fresh.chat("And?", max_new_tokens=6).text]
    wrong = []

    def whole(text, pictures):
        for _ in range(3):
            conversation = pipeline.conversation()
            found = [
                conversation.chat(text, pictures, max_new_tokens=6).text,
                conversation.chat("And?", max_new_tokens=6).text,
            ]
            if found != alone[text]:
                wrong.append((text, found))

    def streamed(text, pictures):
        for _ in range(3):
            conversation = pipeline.conversation()
            found = [
                "".join(conversation.chat(t, p, max_new_tokens=6, stream=True))
                for t, p in ((text, pictures), ("And?", []))
            ]
            if found != alone[text]:
                wrong.append((text, found))

    def batched():
        for _ in range(3):
            found = [answer.text for answer in pipeline.chat_batch(plans, max_new_tokens=6, progress=False)]
            if found != [alone[text][0] for text, _ in plans]:
                wrong.append(found)

    together(
        *((lambda plan=plan, kind=kind: kind(*plan)) for plan, kind in zip(plans, (whole, streamed, whole, streamed))),
        batched,
    )
    assert not wrong
    assert pipeline.decoder.prefixes.held_bytes <= 300_000


def test_reset_by_another_thread_while_it_answers(own, caplog):
    conversation = own.pipeline().conversation()
    conversation.chat("Hello.", [own.pictures[0]], max_new_tokens=2)
    began, went_on = threading.Event(), threading.Event()

    def hold(ids, scores):
        began.set()
        went_on.wait(20)
        return torch.zeros(len(ids), dtype=torch.bool)

    def reset():
        began.wait(20)
        conversation.reset()
        went_on.set()

    together(lambda: conversation.chat("And?", max_new_tokens=4, stopping_criteria=[hold]), reset)
    assert conversation.turns == [] and conversation.pictures == []
    assert "not kept" in caplog.text
    assert conversation.chat("Hi.", max_new_tokens=3).image_tokens == 0


def test_reset_between_the_reading_of_turns_and_pictures(own):
    """A question is made from one state of the conversation: no turn keeps the tag of a picture that is gone."""
    pipeline = own.pipeline()

    class Turns(list):
        def __iter__(self):
            turns = list(super().__iter__())
            other = threading.Thread(target=conversation.reset)
            other.start()
            other.join(timeout=0.5)
            return iter(turns)

    conversation = pipeline.conversation()
    conversation.chat(QUESTION, [own.pictures[0]], max_new_tokens=2)
    history = [*conversation.turns, ("And?", None)]
    conversation.turns = Turns(conversation.turns)
    assert conversation.chat("And?", max_new_tokens=4).token_ids == own.plain(history, own.pictures[:1], 4)
    # The reset stays in force.
    assert conversation.turns == [] and conversation.pictures == []


# --- numbers that are not finite ---


@contextlib.contextmanager
def spoiled(tensor, value):
    kept = tensor.clone()
    with torch.no_grad():
        tensor.flatten()[3] = value
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(kept)


BROKEN = [
    (
        "model.language_model.layers.1.mlp.down_proj.weight",
        torch.nan,
        "begins in layers 1 to 1 of 0 to 1; the weights of layer 1 are not finite",
    ),
    (
        "model.language_model.layers.0.self_attn.v_proj.weight",
        torch.nan,
        "begins in layers 0 to 1 of 0 to 1; the weights of layer 0 are not",
    ),
    ("lm_head.weight", torch.inf, "all 2 layers are finite, those of the last norm or lm_head are not"),
    (
        "model.language_model.norm.weight",
        torch.nan,
        "all 2 layers are finite, those of the last norm or lm_head are not",
    ),
]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name,value,message", BROKEN, ids=[name for name, *_ in BROKEN])
def test_not_finite_weights_are_named(changeable, own, name, value, message, streamed, sampling):
    model = changeable.model
    conversation = changeable.conversation()
    first = conversation.chat(QUESTION, [own.pictures[0]], max_new_tokens=3)
    parameter = dict(model.named_parameters())[name]
    with spoiled(parameter, value), pytest.raises(FloatingPointError, match=message):
        list(conversation.chat("And?", max_new_tokens=4, stream=streamed, **sampling))
    assert len(conversation.turns) == len(conversation.pictures) == 1 and not stream_threads()
    second = conversation.chat("And?", max_new_tokens=4)
    history = [("<image>\n" + QUESTION, first.text), ("And?", None)]
    assert second.token_ids == own.plain(history, own.pictures[:1], 4)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1e-40),
        dict(temperature=1.0, logits_processor=[lambda ids, scores: torch.full_like(scores, -torch.inf)]),
    ],
    ids=["temperature", "processor"],
)
def test_nothing_left_to_draw_from(own, options):
    """A token that cannot be drawn is an error; on a GPU, multinomial would make the process's context unusable."""
    pipeline = own.pipeline()
    with pytest.raises(FloatingPointError, match="new token 1 cannot be drawn: temperature or logits processors"):
        pipeline.chat(QUESTION, max_new_tokens=3, **options)
    answers = pipeline.chat_batch([QUESTION, "And?"], max_new_tokens=3, progress=False, **options)
    assert all(isinstance(answer.error, FloatingPointError) for answer in answers)
    assert pipeline.chat(QUESTION, max_new_tokens=3).token_ids == own.plain([(QUESTION, None)], [], 3)


def test_seeded_answers_in_threads_and_whatever_else_draws(own):
    pipeline = own.pipeline()
    options = dict(max_new_tokens=12, temperature=1.5)
    expected = {seed: pipeline.conversation().chat(QUESTION, seed=seed, **options).token_ids for seed in range(4)}
    assert len(set(map(tuple, expected.values()))) > 1
    given = {}

    def ask(seed):
        given[seed] = [pipeline.conversation().chat(QUESTION, seed=seed, **options).token_ids for _ in range(5)]

    together(*(lambda seed=seed: ask(seed) for seed in expected))
    assert given == {seed: [ids] * 5 for seed, ids in expected.items()}
    pieces = []
    for piece in pipeline.conversation().chat(QUESTION, seed=1, stream=True, **options):
        torch.rand(3)
        pieces.append(piece)
    assert "".join(pieces) == pipeline.conversation().chat(QUESTION, seed=1, **options).text


@pytest.mark.parametrize("beams", [1, 2])
def test_a_seed_by_their_loop_is_that_of_ours(own, beams):
    """A seed gives the same answer by transformers' loop and by ours, and the global state stays as it is."""
    options = dict(max_new_tokens=12, temperature=1.5, seed=3)
    theirs = dict(output_scores=True, num_beams=beams)
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    first = own.pipeline().chat(QUESTION, **theirs, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(2)
    assert own.pipeline().chat(QUESTION, **theirs, **options) == first
    if beams == 1:
        assert own.pipeline().chat(QUESTION, **options) == first


def test_an_answer_is_not_lost_where_there_is_no_memory_to_keep_its_keys(own, monkeypatch, caplog):
    def full(self, start, stop):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pipeline = own.pipeline()
    monkeypatch.setattr(KVCache, "read", full)
    conversation = pipeline.conversation()
    first = conversation.chat(QUESTION, max_new_tokens=4)
    second = conversation.chat("And?", max_new_tokens=4)
    assert second.cached_tokens == 0 and len(conversation.turns) == 2
    assert second.token_ids == own.plain([(QUESTION, first.text), ("And?", None)], [], 4)
    assert "are not kept: CUDA out of memory" in caplog.text


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 1}], ids=["greedy", "sampled"])
def test_not_finite_image_tokens(own, sampling):
    pipeline = own.pipeline()
    good = pipeline.chat(QUESTION, [own.pictures[0]], max_new_tokens=3)
    conversation = pipeline.conversation()
    conversation.chat(QUESTION, [own.pictures[0]], max_new_tokens=3)
    picture = conversation.pictures[0]
    conversation.pictures = [
        type(picture)(torch.full_like(picture.tokens, torch.nan), b"another digest of 32 bytes.....")
    ]
    with pytest.raises(FloatingPointError, match="the image tokens are not finite before any layer"):
        conversation.chat("And?", max_new_tokens=3, **sampling)
    pipeline.clear_kv_cache()
    assert pipeline.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=3) == good


def test_not_finite_in_the_middle_of_an_answer(own):
    """If logits stop being finite at some position, nothing of that answer is remembered."""
    pipeline = own.pipeline()
    free = pipeline.chat("Hello.", max_new_tokens=8)
    calls = []

    def spoil(module, arguments, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 5 else output

    hook = pipeline.model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(
            FloatingPointError, match="new token 5 are not finite, but those of a second pass over the same tokens are"
        ):
            pipeline.conversation().chat("Hello.", max_new_tokens=8)
    finally:
        hook.remove()
    assert pipeline.conversation().chat("Hello.", max_new_tokens=8) == free


# --- weights and settings that change between turns ---


@torch.no_grad()
def in_place(pipeline):
    pipeline.model.model.language_model.layers[0].self_attn.v_proj.weight.mul_(-1.5)


def load_state_dict(pipeline):
    state = {name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()}
    state["model.language_model.layers.1.self_attn.k_proj.weight"] *= -1.5
    pipeline.model.load_state_dict(state)


def assign_state_dict(pipeline):
    state = {name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    pipeline.model.load_state_dict(state, assign=True)


def to_and_back(pipeline):
    pipeline.model.to(torch.bfloat16)
    pipeline.model.to(torch.float32)


def another_head(pipeline):
    head = torch.nn.Linear(64, 400, bias=False)
    with torch.no_grad():
        head.weight.copy_(pipeline.model.lm_head.weight.flip(0))
    pipeline.model.lm_head = head


def another_language_model(pipeline):
    other = copy.deepcopy(pipeline.model.model.language_model)
    with torch.no_grad():
        other.layers[0].self_attn.v_proj.weight.mul_(-1.5)
    pipeline.model.model.language_model = other


def a_hook(pipeline):
    layer = pipeline.model.model.language_model.layers[0]
    layer.register_forward_hook(
        lambda module, arguments, output: output * -0.5 if torch.is_tensor(output) else (output[0] * -0.5, *output[1:])
    )


def a_patched_forward(pipeline):
    mlp = pipeline.model.model.language_model.layers[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: whole(x) * -1.5


def eager_attention(pipeline):
    pipeline.model.set_attn_implementation("eager")


def adapter(pipeline, name="default"):
    # The model's own `add_adapter` does the same, but transformers 5.24 wants a newer peft for it than there is.
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    config = LoraConfig(
        target_modules=r".*language_model.*(q_proj|v_proj)", r=4, lora_alpha=64, init_lora_weights=False
    )
    inject_adapter_in_model(config, pipeline.model, adapter_name=name)
    for layer in adapted_layers(pipeline):
        layer.set_adapter(name)


def adapted_layers(pipeline):
    return [part for part in pipeline.model.modules() if hasattr(part, "merged_adapters")]


def without_adapters(pipeline):
    for layer in adapted_layers(pipeline):
        layer.enable_adapters(False)


def adapter_off(pipeline):
    adapter(pipeline)
    pipeline.chat("Warm.", max_new_tokens=2)
    without_adapters(pipeline)


def adapter_rescaled(pipeline):
    for part in pipeline.model.modules():
        if hasattr(part, "scale_layer"):
            part.scale_layer(-3.0)


def adapter_merged(pipeline):
    for part in pipeline.model.modules():
        if hasattr(part, "merge"):
            part.merge()


@torch.no_grad()
def adapter_trained(pipeline):
    for name, parameter in pipeline.model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(-2)


CHANGES = [
    (None, in_place),
    (None, load_state_dict),
    (None, assign_state_dict),
    (None, to_and_back),
    (None, another_head),
    (None, another_language_model),
    (None, a_hook),
    (None, a_patched_forward),
    (None, eager_attention),
    (None, adapter),
    (None, adapter_off),
    (adapter, without_adapters),
    (adapter, adapter_rescaled),
    (adapter, adapter_merged),
    (adapter, adapter_trained),
    (adapter, lambda pipeline: adapter(pipeline, "second")),
]


# The other changes do not alter the answers, or hardly.
SHOWN = (
    in_place,
    load_state_dict,
    assign_state_dict,
    another_head,
    another_language_model,
    a_hook,
    a_patched_forward,
    adapter,
)
SHOWN += (adapter_rescaled, adapter_trained)


@pytest.mark.slow
@pytest.mark.parametrize("before,change", CHANGES, ids=lambda f: getattr(f, "__name__", str(f)))
def test_a_changed_model_answers_as_a_fresh_one(changeable, own, before, change):
    if before is not None:
        before(changeable)
    history = []
    conversation = changeable.conversation()
    for question in (QUESTION, "And?"):
        answer = conversation.chat(question, [own.pictures[0]] if not history else None, max_new_tokens=6)
        history.append((("<image>\n" if not history else "") + question, answer.text))
    unchanged = changeable.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    assert unchanged.cached_tokens == unchanged.prompt_tokens - 1
    change(changeable)
    turns = [*history, ("Why?", None)]
    third = conversation.chat("Why?", max_new_tokens=6)
    # The conversation keeps its image tokens, which none of these changes affects.
    assert third.token_ids == plain(changeable.model, own.processor, turns, own.pictures[:1], 6)
    fresh = Pipeline(changeable.model, own.processor).chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    again = changeable.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    assert again.token_ids == fresh.token_ids
    if change in SHOWN:
        assert again.token_ids != unchanged.token_ids


def test_other_weights_at_the_same_place(changeable, own):
    """Weights that are replaced through `.data`, as `to` does, are noticed even at the same address.

    Such a change is not counted by the tensor. After a second one, the first address is free and may be used again.
    """
    weight = changeable.model.model.language_model.layers[0].self_attn.v_proj.weight
    changeable.chat(QUESTION, max_new_tokens=2)
    place = weight.data_ptr()
    for _ in range(50):
        weight.data = weight.data * -1.5
        if weight.data_ptr() == place:
            break
    answer = changeable.conversation().chat(QUESTION, max_new_tokens=6)
    assert answer.token_ids == plain(changeable.model, own.processor, [(QUESTION, None)], [], 6)


def test_weights_changed_while_another_thread_answers(changeable, own):
    """Values computed with old weights are not remembered once another request has come with new weights."""
    pipeline = changeable
    began, went_on = threading.Event(), threading.Event()

    def hold(ids, scores):
        began.set()
        went_on.wait(20)
        return torch.zeros(len(ids), dtype=torch.bool)

    def change():
        began.wait(20)
        try:
            in_place(pipeline)
            pipeline.conversation().chat("Something else.", max_new_tokens=1)
        finally:
            went_on.set()

    together(lambda: pipeline.chat(QUESTION, [own.pictures[0]], max_new_tokens=3, stopping_criteria=[hold]), change)
    answer = pipeline.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    assert answer.token_ids == plain(
        pipeline.model, own.processor, [("<image>\n" + QUESTION, None)], own.pictures[:1], 6
    )


def test_kept_values_are_dropped_for_a_request_in_flight(own):
    """A request that was running at `clear_kv_cache` leaves nothing behind, even if another request came after it."""
    pipeline = own.pipeline()
    began, went_on = threading.Event(), threading.Event()

    def hold(ids, scores):
        began.set()
        went_on.wait(20)
        return torch.zeros(len(ids), dtype=torch.bool)

    def clear():
        began.wait(20)
        pipeline.clear_kv_cache()
        pipeline.conversation().chat("Something else.", max_new_tokens=1)
        went_on.set()

    together(lambda: pipeline.chat(QUESTION, max_new_tokens=3, stopping_criteria=[hold]), clear)
    template = pipeline.conversation().chat("Anything.", max_new_tokens=1).cached_tokens
    assert pipeline.conversation().chat(QUESTION, max_new_tokens=1).cached_tokens <= template + 2


def test_pictures_are_told_apart_by_content(own, tmp_path):
    from PIL import Image

    pipeline = own.pipeline()
    with Image.open(own.pictures[0]) as picture:
        same = tmp_path / "copy.bmp"
        picture.convert("RGB").save(same)
        other = picture.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    first = pipeline.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=6)
    copied = pipeline.conversation().chat(QUESTION, [same], max_new_tokens=6)
    assert copied == first and copied.cached_tokens == copied.prompt_tokens - 1
    flipped = pipeline.conversation().chat(QUESTION, [other], max_new_tokens=6)
    # Positions up to the picture are reused.
    assert flipped.cached_tokens == own.processor.encode(render("vicuna_v1", [("<image>\n" + QUESTION, None)]))[
        1
    ].index(1)
    assert flipped.token_ids == plain(own.model, own.processor, [("<image>\n" + QUESTION, None)], [other], 6)
    # The same two pictures are asked about in both orders.
    both = pipeline.conversation().chat(QUESTION, [own.pictures[0], other], max_new_tokens=6)
    turned = pipeline.conversation().chat(QUESTION, [other, own.pictures[0]], max_new_tokens=6)
    for answer, pictures in ((both, [own.pictures[0], other]), (turned, [other, own.pictures[0]])):
        assert answer.token_ids == plain(
            own.model, own.processor, [("<image>\n<image>\n" + QUESTION, None)], pictures, 6
        )


@pytest.mark.parametrize(
    "caches", [dict(kv_cache_bytes=0), dict(image_cache_bytes=0), dict(kv_cache_bytes=0, image_cache_bytes=0)], ids=str
)
@pytest.mark.parametrize("clear", ["clear_image_cache", "clear_kv_cache", None])
def test_caches_off_or_cleared_between_turns(own, caches, clear):
    pipeline = own.pipeline(**caches)
    history = []
    for question in (QUESTION, "And?"):
        answer = pipeline.chat(question, [own.pictures[0]] if not history else None, max_new_tokens=5)
        tagged = ("<image>\n" if not history else "") + question
        assert answer.token_ids == own.plain([*history, (tagged, None)], own.pictures[:1], 5)
        history.append((tagged, answer.text))
        if clear:
            getattr(pipeline, clear)()
    again = pipeline.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=5)
    assert again.token_ids == own.plain([("<image>\n" + QUESTION, None)], own.pictures[:1], 5)
    if clear is None:
        assert bool(again.cached_tokens) == bool(caches.get("kv_cache_bytes", 1))


def test_negative_bytes(own):
    with pytest.raises(ValueError, match="kv_cache_bytes: expected 0 or more"):
        own.pipeline(kv_cache_bytes=-1)


# --- options ---

OURS = [
    dict(repetition_penalty=1.7),
    dict(min_new_tokens=10, eos_token_id=[*range(3, 300)]),
    dict(eos_token_id=[*range(3, 200)]),
    dict(no_repeat_ngram_size=2),
    dict(bad_words_ids=[[97], [60, 61]]),
    dict(suppress_tokens=[*range(100, 400)]),
    dict(logits_processor=[lambda ids, scores: scores.roll(1, dims=-1)]),
    dict(stopping_criteria=[lambda ids, scores: torch.full((len(ids),), ids.shape[1] > 60)]),
    dict(guidance_scale=1.5),
    dict(exponential_decay_length_penalty=(2, 1.5)),
    dict(generation_config=GenerationConfig(repetition_penalty=1.7)),
]
THEIRS = [
    (dict(num_beams=3), "beam search"),
    (dict(prompt_lookup_num_tokens=3), "assisted generation"),
    (dict(cache_implementation="static"), "cache_implementation='static'"),
    (dict(use_cache=False), "use_cache=False"),
    (dict(generation_config=GenerationConfig(num_beams=2)), "beam search"),
]


@pytest.mark.parametrize("options", OURS, ids="-".join)
def test_options_of_this_loop(own, options, caplog):
    answer = own.pipeline().chat(QUESTION, [own.pictures[0]], max_new_tokens=12, **options)
    assert answer.token_ids == own.plain([("<image>\n" + QUESTION, None)], own.pictures[:1], 12, **options)
    assert "own loop" not in caplog.text


@pytest.mark.parametrize("options,reason", THEIRS)
def test_options_of_theirs(own, options, reason, caplog):
    pipeline = own.pipeline()
    for _ in range(2):
        answer = pipeline.conversation().chat(QUESTION, [own.pictures[0]], max_new_tokens=8, **options)
        assert answer.token_ids == own.plain([("<image>\n" + QUESTION, None)], own.pictures[:1], 8, **options)
        assert answer.cached_tokens == 0
    said = [record.getMessage() for record in caplog.records if "own loop" in record.getMessage()]
    assert len(said) == 1 and reason in said[0]


def test_an_end_in_a_generation_config(own):
    pipeline = own.pipeline()
    free = pipeline.conversation().chat(QUESTION, max_new_tokens=8)
    end = next(token for i, token in enumerate(free.token_ids) if i > 1 and token not in free.token_ids[:i])
    config = GenerationConfig(eos_token_id=[end], pad_token_id=0)
    answer = pipeline.conversation().chat(QUESTION, max_new_tokens=8, generation_config=config)
    assert answer.finish_reason == "stop" and answer.token_ids[-1] == end
    assert len(answer.token_ids) > 2
    exactly = pipeline.conversation().chat(QUESTION, max_new_tokens=len(answer.token_ids), generation_config=config)
    assert exactly.finish_reason == "stop"
    batch = pipeline.chat_batch(
        [QUESTION, "Hello, and who are you?"], max_new_tokens=8, generation_config=config, progress=False
    )
    assert batch[0].token_ids == answer.token_ids


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_strings_that_end_an_answer(own, options):
    """Stop strings end an answer; this model begins its answer about the picture with "%tion"."""
    turns, strings = [("<image>\n" + QUESTION, None)], ["nowhere", "tio"]
    expected = own.plain(
        turns, own.pictures[:1], 12, stop_strings=strings, tokenizer=own.processor.tokenizer, **options
    )
    answer = own.pipeline().chat(QUESTION, [own.pictures[0]], max_new_tokens=12, stop_strings=strings, **options)
    assert answer.token_ids == expected and len(expected) < 12
    assert answer.finish_reason == "stop" and answer.text.endswith("tion")


def test_time_that_is_up(own):
    answer = own.pipeline().chat("Hello.", max_new_tokens=1000, min_new_tokens=1000, max_time=0.05)
    assert answer.finish_reason == "stop" and 0 < len(answer.token_ids) < 500


def test_an_unknown_option(own):
    pipeline = own.pipeline()
    for streamed in (False, True):
        with pytest.raises(ValueError, match="max_tokens"):
            list(pipeline.chat("hi", max_tokens=3, stream=streamed))
    with pytest.raises(ValueError, match="max_tokens"):
        pipeline.chat_batch(["hi"], max_tokens=3, progress=False)


def test_the_loop_says_what_it_does_not_do(own):
    from mg_fast.decoding import Decoder

    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(PromptError, match="beam search"):
        own.model.generate(input_ids=ids, num_beams=2, max_new_tokens=2, custom_generate=Decoder(own.model).request())
