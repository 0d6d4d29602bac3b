"""The whole model gives what the original's own code answered: states, logits, ids of texts, and pictures."""

import pytest
import torch

import mg_fast
from mg_fast import MMInterleavedProcessor
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved.loaded import inputs, load
from tests.models.mm_interleaved.recorded import NAMES, answers, folder_of, requests

STAGES, LOGITS, PICTURES = 2e-5, 5e-5, 1e-4
TEXTS = ["vqa", "caption", "fewshot", "textonly", "ragged", "twodocs"]
DRAWN = ["t2i", "t2i_batch", "segm", "story"]
GREEDY = [("vqa", "greedy"), ("vqa", "greedy_free"), ("caption", "greedy"), ("caption", "repetition")] + [
    (request, "greedy") for request in TEXTS[2:]
]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because both models are tiny."""


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_states_and_logits(name, backend):
    model, given = load(name), answers(name)
    for asked in TEXTS + DRAWN:
        prompt = inputs(name, asked, given)
        # For drawing, the original counts padding among the positions.
        positions, mask = given.get(f"{asked}.position_ids"), prompt["attention_mask"].bool()
        with mg_fast.use_backend(backend), torch.inference_mode():
            embeddings = model.embed(prompt["input_ids"], image_tokens=prompt["image_tokens"])
            output = model(**prompt, position_ids=positions, output_hidden_states=True)
        assert relative_error(embeddings[mask], given[f"{asked}.inputs_embeds"][mask]) <= STAGES, asked
        if asked in DRAWN:
            expected = [given[f"{asked}.last_hidden"]]
        else:
            expected = given[f"{asked}.hidden"]
            assert len(output.hidden_states) == 1 + len(expected)
            assert relative_error(output.logits[:, -1], given[f"{asked}.last_logits"]) <= LOGITS, asked
        for ours, theirs in zip(output.hidden_states[-len(expected) :], expected):
            assert relative_error(ours[mask], theirs[mask]) <= STAGES, asked


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids_and_logits(name, backend):
    model, given, about = load(name), answers(name), requests(name)
    ends = set(model.generation_config.eos_token_id)
    for asked, variant in GREEDY:
        prompt, settings = inputs(name, asked, given), about[asked]["generations"][variant]["kwargs"]
        with mg_fast.use_backend(backend):
            found = model.generate(
                **prompt,
                max_new_tokens=settings["max_length"],
                min_length=settings["min_length"],
                repetition_penalty=settings.get("repetition_penalty", 1.0),
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = found.sequences[:, prompt["input_ids"].shape[1] :]
        assert torch.equal(found.sequences[:, : -new.shape[1]], prompt["input_ids"])
        # The original returns one BOS and the new tokens.
        assert new.tolist() == given[f"{asked}.{variant}.ids"][:, 1:].tolist(), (asked, variant)
        for step, (ours, theirs) in enumerate(zip(found.logits, given[f"{asked}.{variant}.logits"])):
            # What comes after the end of a row means nothing.
            running = [not set(row[:step]) & ends for row in new.tolist()]
            assert relative_error(ours[running], theirs[running]) <= LOGITS, (asked, variant, step)


@pytest.mark.parametrize("name", NAMES)
def test_from_text_and_pictures_to_text(name):
    """The way a user goes: processor, `generate`, decoded text."""
    folder, model = folder_of(name), load(name)
    processor = MMInterleavedProcessor.from_pretrained(folder)
    texts = [
        "A photo of a round lamp: <image>What is behind the door?",
        "<image>A quiet street. <image>The stone stands on the bridge. What is next?",
    ]
    pictures = [[folder / "image2.png"], [folder / "image0.png", folder / "image1.png"]]
    prompt = processor(text=texts, images=pictures, return_tensors="pt")
    about = requests(name)["ragged"]["generations"]["greedy"]
    found = model.generate(**prompt, max_new_tokens=about["kwargs"]["max_length"], min_length=6)
    said = processor.batch_decode(found[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == about["text"]


@pytest.mark.parametrize("name, asked", [("mmi-tiny", "segm"), ("mmi-tiny", "t2i_batch"), ("mmi-wide", "t2i")])
def test_from_text_and_pictures_to_pictures(name, asked):
    folder, model, about = folder_of(name), load(name), requests(name)[asked]
    processor = MMInterleavedProcessor.from_pretrained(folder)
    texts = {
        "segm": "<image>a street with a tree and a house.",
        "t2i": "a red cat sits on the small table, near the window.",
        "t2i_batch": ["a bright star shines above the hill", "two boats"],
    }[asked]
    shown = [folder / "image0.png"] if asked == "segm" else None
    prompt = processor(text=texts, images=shown, draw=True, return_tensors="pt")
    variant = about["generations"]["steps4"]
    drawn = model.generate_images(
        **prompt,
        **variant["kwargs"],
        generator=torch.Generator("cpu").manual_seed(variant["seed"]),
        output_type="pt",
    )
    assert (drawn - answers(name)[f"{asked}.steps4.picture"]).abs().max() <= PICTURES


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_is_many_passes(name):
    """Passes over parts of a prompt with kept keys and values give what one pass over the whole prompt gives."""
    model, prompt = load(name), inputs(name, "ragged", answers(name))
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    with torch.inference_mode():
        whole = model(**prompt).logits
        read = model.with_pictures(ids, prompt)
        embeddings = model.embed(ids, image_tokens=read["image_tokens"])
        cache, parts = None, []
        for first, last in ((0, 20), (20, 21), (21, ids.shape[1])):
            output = model(
                inputs_embeds=embeddings[:, first:last],
                attention_mask=mask[:, :last],
                past_key_values=cache,
                **model.pass_inputs(read).at(torch.arange(first, last)),
            )
            cache = output.get("past_key_values", output.get("cache"))
            parts.append(output.logits)
    assert relative_error(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()]) <= LOGITS


def test_loss_and_gradients():
    model, prompt = load("mmi-tiny"), inputs("mmi-tiny", "ragged", answers("mmi-tiny"))
    labels = prompt["input_ids"].masked_fill(prompt["attention_mask"] == 0, -100)
    output = model(**prompt, labels=labels)
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, targets))
    gates = [layer.llama_cross_attn.gate for layer in model.mm_decoder.layers if layer.llama_cross_attn is not None]
    found = torch.autograd.grad(output.loss, gates)
    assert len(found) == 2 and all(bool(gradient.abs() > 0) for gradient in found)


def test_last_logits_alone():
    model, prompt = load("mmi-tiny"), inputs("mmi-tiny", "caption", answers("mmi-tiny"))
    with torch.inference_mode():
        whole, last = model(**prompt), model(**prompt, logits_to_keep=2, return_dict=False)
    torch.testing.assert_close(last[0], whole.logits[:, -2:])
    assert whole.image_hidden_states.shape == prompt["image_tokens"].shape


def test_what_forward_refuses():
    model, prompt = load("mmi-tiny"), inputs("mmi-tiny", "caption", answers("mmi-tiny"))
    ids = prompt["input_ids"]
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(mg_fast.PromptError, match="inputs_embeds, and ids after a prompt, need"):
        model(inputs_embeds=model.embed_ids(ids))
    with torch.inference_mode():
        first = model(**prompt)
    with pytest.raises(mg_fast.PromptError, match="ids after a prompt"):
        model(ids[:, :1], past_key_values=first.get("past_key_values", first.get("cache")))
    with pytest.raises(mg_fast.PromptError, match="room for 2"):
        model(ids)
    with pytest.raises(mg_fast.PromptError, match=r"2100 tokens, the model has 2048 positions"):
        model(ids[:1, -1:].expand(1, 2100))
    with pytest.raises(ValueError, match="must keep its 386 tokens"):
        model.resize_token_embeddings(400)
