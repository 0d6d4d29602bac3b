"""Generated texts follow the original's rules: beams, sampling, penalties, lengths, and its settings for each task."""

import copy

import pytest
import torch
from transformers import LogitsProcessorList

from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved import text_settings
from mg_fast.models.mm_interleaved.beam_search import BeamSearch, FinishedTexts
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.models.mm_interleaved.text_settings import NewTokensRepetitionPenalty, TextSettings
from mg_fast.models.mm_interleaved.tokenization import MMInterleavedTokenizer
from mg_fast.models.protocol import CACHE
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

pytestmark = pytest.mark.usefixtures("one_thread")
BEAMS = [
    ("vqa", "default"),
    ("caption", "default"),
    ("fewshot", "beam5"),
    ("ragged", "beam3"),
    ("ragged", "code_default"),
]


def generated(name: str, request: str, variant: str, **options) -> torch.Tensor:
    answers = recorded.answers(name)
    given = inputs(name, request, answers)
    settings = TextSettings(**recorded.requests(name)[request]["generations"][variant]["kwargs"])
    return load(name).generate(**given, **{**settings.generate_arguments(), **options})


@pytest.mark.parametrize("request_name, variant", BEAMS)
@pytest.mark.parametrize("name", recorded.NAMES)
def test_beams_are_the_recorded_ones(name, request_name, variant):
    answers = recorded.answers(name)
    ids = generated(name, request_name, variant)
    new = ids[:, answers[f"{request_name}.text_ids"].shape[1] :]
    expected = answers[f"{request_name}.{variant}.ids"][:, 1:]
    assert torch.equal(new, expected)


def test_beams_search_with_packed_layers_too():
    ids = generated("mmi-wide", "ragged", "beam3")
    packed = BeamSearch(PackedInterleavedDecoding(load("mmi-wide")))
    assert torch.equal(generated("mmi-wide", "ragged", "beam3", custom_generate=packed), ids)


def test_several_texts_of_each_row_with_their_scores():
    out = generated("mmi-wide", "ragged", "beam3", num_return_sequences=2, return_dict_in_generate=True)
    best = generated("mmi-wide", "ragged", "beam3")
    assert torch.equal(out.sequences[::2, : best.shape[1]], best)
    scores = out.sequences_scores.view(2, 2)
    assert bool((scores[:, 0] >= scores[:, 1]).all())


@pytest.mark.parametrize("setting, value", [("output_scores", True), ("do_sample", True), ("stop_strings", ["."])])
def test_other_beam_settings_run_by_transformers_with_a_warning(caplog, setting, value):
    options = {setting: value}
    if setting == "stop_strings":
        options["tokenizer"] = MMInterleavedTokenizer.from_folder(recorded.folder_of("mmi-tiny") / "vicuna-tiny")
    out = generated("mmi-tiny", "vqa", "default", return_dict_in_generate=True, **options)
    assert f"beam search with {setting} runs by transformers' own rules" in caplog.text
    assert (out.scores is not None) == (setting == "output_scores")


@pytest.mark.parametrize("early, done", [(False, True), ("never", False), (True, True)])
def test_when_a_row_of_beams_is_done(early, done):
    """A text of log-likelihood -1.5 has ended. One of -2.0 cannot beat it at 4 tokens, and could at 20."""
    row = FinishedTexts(1, 1.0, early, longest=20)
    row.take([(-1.5, 0, 2), (-9.0, 0, 7)], torch.zeros(1, 2, dtype=torch.long), 0, [2])
    row.done = False
    row.take([(-2.0, 0, 7)], torch.zeros(1, 2, dtype=torch.long), 0, [2])
    assert row.done == done


@pytest.mark.parametrize("name", recorded.NAMES)
def test_sampled_tokens_are_drawn_from_the_recorded_probabilities(name):
    """The recorded draws are forced, and the probabilities that each was drawn from are compared."""
    answers, compared = recorded.answers(name), []
    given = inputs(name, "sampled", answers)
    drawn, model = answers["sampled.ids"][:, 1:], load(name)

    def forced(generating, input_ids, logits_processor, stopping_criteria, generation_config, **model_inputs):
        length, ids = input_ids.shape[1], torch.cat([input_ids, drawn], dim=1)
        read = model.pass_inputs(model_inputs).extended(ids.shape[1])
        tokens = model_inputs["image_tokens"]
        embeddings = torch.cat([model.embed(input_ids, image_tokens=tokens), model.embed_ids(drawn)], dim=1)
        hidden = model.mm_decoder(inputs_embeds=embeddings, **read.constant, **read.by_position).last_hidden_state
        logits = model.text_decoder(hidden)
        for step in range(drawn.shape[1]):
            scores = logits_processor(ids[:, : length + step], logits[:, length + step - 1])
            compared.append(scores.softmax(dim=-1)[0])
        return ids

    settings = TextSettings(**recorded.requests(name)["sampled"]["kwargs"])
    model.generate(**given, **settings.generate_arguments(), custom_generate=forced)
    ours, expected = torch.stack(compared), answers["sampled.probabilities"]
    assert torch.equal(ours > 0, expected > 0) and relative_error(ours, expected) <= 5e-5
    # With the original's seed, the draws are the same as well.
    torch.manual_seed(0)
    ids = model.generate(**given, **settings.generate_arguments())
    assert torch.equal(ids[:, given["input_ids"].shape[1] :], drawn)


def test_pictures_are_encoded_once_for_all_beams_and_samples(monkeypatch):
    model, answers, seen = load("mmi-tiny"), recorded.answers("mmi-tiny"), []
    given = inputs("mmi-tiny", "ragged", answers)
    prompt = {name: given[name] for name in ("input_ids", "attention_mask", "num_image_per_seq")}
    pixels = recorded.pixels("mmi-tiny", [2, 0, 1], answers)
    encode = model.visual_tokenizer.forward
    monkeypatch.setattr(model.visual_tokenizer, "forward", lambda *a, **k: seen.append(1) or encode(*a, **k))
    beams = model.generate(
        **prompt, pixel_values=pixels, **TextSettings(max_length=4, min_length=3).generate_arguments()
    )
    torch.manual_seed(0)
    samples = model.generate(**prompt, pixel_values=pixels, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert len(seen) == 2 and samples.shape == (6, 59)
    assert torch.equal(beams, model.generate(**given, **TextSettings(max_length=4, min_length=3).generate_arguments()))
    # The rows that follow each other see the pictures of their own prompt.
    torch.manual_seed(0)
    assert torch.equal(samples, model.generate(**given, max_new_tokens=3, do_sample=True, num_return_sequences=3))
    alone = [model.generate(**given, max_new_tokens=4, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*alone)


def test_a_prompt_in_two_parts_with_kept_keys_and_values():
    """transformers' own loop goes on from a cache; pictures of the earlier part are not spliced again."""
    model, answers = load("mmi-tiny"), recorded.answers("mmi-tiny")
    given = inputs("mmi-tiny", "fewshot", answers)
    first = {**given, "input_ids": given["input_ids"][:, :40], "attention_mask": given["attention_mask"][:, :40]}
    first.update(
        {name: given[name][:1] for name in ("image_tokens", "image_maps")}, num_image_per_seq=torch.tensor([1])
    )
    out = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)
    cache = out[CACHE]
    again = model.generate(**given, max_new_tokens=6, **{CACHE: cache})
    assert cache.get_seq_length() > 80
    assert torch.equal(again, model.generate(**given, max_new_tokens=6))


def test_settings_of_the_tasks():
    assert text_settings.QUESTION.generate_arguments() == {
        "max_new_tokens": 10,
        "min_new_tokens": 0,
        "num_beams": 3,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "num_return_sequences": 1,
        "length_penalty": 0.0,
    }
    sampling = text_settings.INTERLEAVED.generate_arguments()
    assert sampling["do_sample"] and sampling["top_k"] == 50 and sampling["min_new_tokens"] == 7
    assert text_settings.CAPTION.max_length == 20 and text_settings.PARAGRAPH.min_length == 90


def test_settings_in_a_configuration_mean_the_same():
    """The caller's configuration is not changed."""
    model, answers = load("mmi-tiny"), recorded.answers("mmi-tiny")
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=14, min_length=6, repetition_penalty=1.3)
    ids = model.generate(**inputs("mmi-tiny", "caption", answers), generation_config=config)
    assert torch.equal(ids[:, 13:], answers["caption.repetition.ids"][:, 1:])
    assert (config.min_length, config.repetition_penalty, config.min_new_tokens) == (6, 1.3, None)


def test_the_penalty_sees_bos_and_new_tokens_alone():
    penalty = NewTokensRepetitionPenalty(2.0, prompt=3, bos_token_id=1)
    ids, scores = torch.tensor([[4, 5, 6, 7, 7]]), torch.ones(1, 9)
    assert penalty(ids, scores).tolist() == [[1, 0.5, 1, 1, 1, 1, 1, 0.5, 1]]


def test_the_caller_s_processors_come_after_the_penalty():
    seen = []

    def watching(ids, scores):
        seen.append(scores.clone())
        return scores

    given = inputs("mmi-tiny", "vqa", recorded.answers("mmi-tiny"))
    for penalty in (1.0, 5.0):
        load("mmi-tiny").generate(
            **given, max_new_tokens=1, repetition_penalty=penalty, logits_processor=LogitsProcessorList([watching])
        )
    changed = (seen[0] != seen[1]).nonzero()[:, 1]
    assert changed.tolist() == [1]


def test_what_generate_refuses():
    model = load("mmi-tiny")
    given = inputs("mmi-tiny", "vqa", recorded.answers("mmi-tiny"))
    with pytest.raises(PromptError, match="got none"):
        model.generate(max_new_tokens=1)
    with pytest.raises(PromptError, match="got inputs_embeds"):
        model.generate(**given, inputs_embeds=torch.zeros(1, 78, 64))
    with pytest.raises(PromptError, match="78 prompt tokens and max_new_tokens=2000 need 2078 positions"):
        model.generate(**given, max_new_tokens=2000)
    with pytest.raises(PromptError, match="prefill_chunk_size"):
        model.generate(**given, max_new_tokens=2, prefill_chunk_size=8)
    with pytest.raises(PromptError, match=r"has room for 1 picture\(s\), but 0 came"):
        model.generate(given["input_ids"], max_new_tokens=2)
    with pytest.raises(PromptError, match="image_tokens came without image_maps"):
        model.generate(given["input_ids"], image_tokens=given["image_tokens"], max_new_tokens=2)
    for ids in (given["input_ids"][0], given["input_ids"].float(), given["input_ids"][:, :0], [[1, 2]]):
        with pytest.raises(PromptError, match=r"input_ids: expected whole numbers \[B, L\], .* got "):
            model.generate(ids, max_new_tokens=2)
