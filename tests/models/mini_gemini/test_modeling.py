"""The model: batches, several pictures, beams, lengths, training, transformers' pipeline and PEFT."""

import copy

import pytest
import torch
import torch.nn.functional as F

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor, PromptError
from mg_fast.models.protocol import CACHE_NAMES
from mg_fast.models.templates import render
from mg_fast.testing.random_checkpoints import build
from tests.families import family

GREEDY = dict(do_sample=False, max_new_tokens=12)


def prompt(question, pictures=1):
    return render("vicuna_v1", [("<image>\n" * pictures + question, None)])


def ids_of(model, inputs, **options):
    out = model.generate(**inputs, **(GREEDY | options))
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def trimmed(row, stop=2):
    return row[: row.index(stop) + 1] if stop in row else row


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "tiny-gemma", "tiny-mixtral"])
@pytest.mark.parametrize("hd", [False, True], ids=["standard", "hd"])
def test_ragged_batch_answers_as_alone(tmp_path, photo, drawing, size, hd):
    folder = build(tmp_path, size=size, hd=hd, seed=5)
    processor = MiniGeminiProcessor.from_pretrained(folder, template="vicuna_v1")
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    requests = [
        (prompt("What is written in the picture?"), [photo]),
        (prompt("Hello, who are you and what can you do for me today?", 0), []),
        (prompt("Compare the two.", 2), [drawing, photo]),
        (prompt("And this one?"), [drawing]),
    ]
    batch = processor(
        text=[text for text, _ in requests], images=[images for _, images in requests], return_tensors="pt"
    )
    assert batch["attention_mask"].sum(1).unique().numel() == len(requests), "the batch is meant to be ragged"
    stops = set(model.generation_config.eos_token_id)
    for row, (text, images) in zip(ids_of(model, batch), requests):
        alone = ids_of(model, processor(text=text, images=images or None, return_tensors="pt"))[0]
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        assert row[:end] == alone


def test_same_input_twice_is_bit_equal(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_two_pictures_with_beams(model, processor, photo, drawing):
    """Every beam sees both pictures in order, as if image tokens had been encoded beforehand and repeated by hand."""
    inputs = processor(text=prompt("Compare.", 2), images=[photo, drawing], return_tensors="pt")
    swapped = processor(text=prompt("Compare.", 2), images=[drawing, photo], return_tensors="pt")
    beams = dict(num_beams=3, num_return_sequences=3)
    ours = ids_of(model, inputs, **beams)
    with torch.inference_mode():
        tokens = model.get_image_features(inputs["pixel_values"], inputs["pixel_values_hr"]).pooler_output
        embeds = model.model.splice(
            model.get_input_embeddings()(inputs["input_ids"]), tokens, inputs["mm_token_type_ids"]
        )
    by_hand = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **(GREEDY | beams)).tolist()
    assert ours == by_hand
    assert ours != ids_of(model, swapped, **beams)


def test_beams_of_a_batch_with_uneven_pictures(model, processor, photo, drawing):
    texts = [prompt("Compare.", 2), prompt("Hello there", 0), prompt("What?")]
    pictures = [[photo, drawing], [], [drawing]]
    batch = ids_of(model, processor(text=texts, images=pictures, return_tensors="pt"), num_beams=2)
    for row, text, images in zip(batch, texts, pictures):
        alone = ids_of(model, processor(text=text, images=images or None, return_tensors="pt"), num_beams=2)[0]
        assert trimmed(row) == trimmed(alone)


def test_num_return_sequences(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(**inputs, do_sample=True, temperature=2.0, num_return_sequences=3, max_new_tokens=6)
    rows = {tuple(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()}
    assert len(rows) == 3


def test_image_tokens_instead_of_pixels(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    tokens = model.get_image_features(inputs["pixel_values"], inputs["pixel_values_hr"]).pooler_output
    seen = {k: v for k, v in inputs.items() if not k.startswith("pixel")} | {"image_tokens": tokens}
    assert ids_of(model, seen) == ids_of(model, inputs)
    with pytest.raises(ValueError, match="got pixel_values and image_tokens"):
        model(**inputs, image_tokens=tokens)


def test_static_cache_and_prompt_lookup_give_the_same_ids(model, processor, photo):
    inputs = processor(text=prompt("What is in the picture?"), images=photo, return_tensors="pt")
    expected = ids_of(model, inputs)
    assert ids_of(model, inputs, prompt_lookup_num_tokens=3) == expected
    assert ids_of(model, inputs, use_cache=False) == expected
    assert ids_of(model, inputs, cache_implementation="static", disable_compile=True) == expected


def test_a_cache_of_the_first_turn_can_be_continued(model, processor, photo):
    """A second turn with the first turn's cache gives the same as the whole history sent afresh."""
    first = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    extra = torch.tensor([processor.tokenizer(" USER: And now? ASSISTANT:", add_special_tokens=False).input_ids])
    ids = torch.cat([out.sequences, extra], dim=1)
    marks = torch.cat(
        [first["mm_token_type_ids"], torch.zeros(1, ids.shape[1] - first["input_ids"].shape[1], dtype=torch.long)],
        dim=1,
    )
    request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": marks}
    fresh = model.generate(
        **request, pixel_values=first["pixel_values"], pixel_values_hr=first["pixel_values_hr"], **GREEDY
    )
    continued = model.generate(**request, past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)
    assert continued.tolist() == fresh.tolist()


def turns(processor, model, photo, drawing):
    """A first turn about two pictures with its cache, and a second turn that adds another picture."""
    first = processor(text=prompt("Compare.", 2), images=[photo, drawing], return_tensors="pt")
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    extra = processor(text="<image>\nAnd this one?", images=[drawing], add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([out.sequences, extra["input_ids"]], dim=1)
    marks = F.pad(first["mm_token_type_ids"], (0, out.sequences.shape[1] - first["input_ids"].shape[1]))
    marks = torch.cat([marks, extra["mm_token_type_ids"]], dim=1)
    pixels = [
        {name: tensor for name, tensor in inputs.items() if name.startswith("pixel")} for inputs in (first, extra)
    ]
    every = {name: torch.cat([part[name] for part in pixels]) for name in pixels[0]}
    request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": marks}
    return request, out.past_key_values, every, pixels[1]


@pytest.mark.parametrize("given", ["all", "new", "image tokens"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_turns_with_pictures_over_a_cache_of_ones_own(model, processor, photo, drawing, given, options):
    """Pictures whose places are in the cache already may be given again."""
    request, cache, every, new = turns(processor, model, photo, drawing)
    if options.get("num_beams"):
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(options["num_beams"])
    fresh = model.generate(**request, **every, **GREEDY, **options)
    pictures = {"all": every, "new": new}.get(given) or {
        "image_tokens": model.get_image_features(**every).pooler_output
    }
    encoded = []
    hook = model.model.vision_tower_aux.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    try:
        continued = model.generate(**request, **pictures, past_key_values=copy.deepcopy(cache), **GREEDY, **options)
    finally:
        hook.remove()
    assert continued.tolist() == fresh.tolist()
    assert encoded == ([] if given == "image tokens" else [1])


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_text_turn_over_a_cache_with_pictures(model, processor, photo, name):
    """A text turn may send everything again, the usual way to continue, while the cache has all of the pictures.

    The cache goes by the names of older and of newer releases of transformers.
    """
    first = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    extra = torch.tensor([processor.tokenizer(" USER: And now? ASSISTANT:", add_special_tokens=False).input_ids])
    ids = torch.cat([out.sequences, extra], dim=1)
    marks = F.pad(first["mm_token_type_ids"], (0, ids.shape[1] - first["input_ids"].shape[1]))
    pixels = {name: tensor for name, tensor in first.items() if name.startswith("pixel")}
    request = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": marks, **pixels}
    fresh = model.generate(**request, **GREEDY)
    assert model.generate(**request, **{name: copy.deepcopy(out.past_key_values)}, **GREEDY).tolist() == fresh.tolist()
    # This is a caller's own loop over `forward`.
    start = out.past_key_values.get_seq_length()
    with torch.no_grad():
        whole = model(**request).logits[:, start:]
        step = model(**{**request, "input_ids": ids[:, start:]}, **{name: copy.deepcopy(out.past_key_values)}).logits
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_a_batch_over_a_cache_keeps_each_rows_new_pictures(model, processor, photo, drawing):
    inputs = processor(
        text=[prompt("Compare.", 2)] * 2, images=[[photo, drawing], [drawing, photo]], return_tensors="pt"
    )
    n = processor.image_processor.tokens_per_picture
    # The cut is at the end of each row's first picture.
    cut = inputs["mm_token_type_ids"][0].tolist().index(1) + n
    marks = inputs["mm_token_type_ids"]
    with torch.no_grad():
        whole = model(**inputs).logits[:, cut:]
        pixels = {name: tensor for name, tensor in inputs.items() if name.startswith("pixel")}
        firsts = {name: tensor[[0, 2]] for name, tensor in pixels.items()}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache = model(
            input_ids=ids[:, :cut], attention_mask=mask[:, :cut], mm_token_type_ids=marks[:, :cut], **firsts
        ).past_key_values
        rest = model(
            input_ids=ids[:, cut:], attention_mask=mask, mm_token_type_ids=marks, past_key_values=cache, **pixels
        )
    torch.testing.assert_close(rest.logits, whole, rtol=1e-4, atol=1e-4)
    assert len(rest.image_hidden_states) == 2


def test_pictures_that_do_not_match_a_cache(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    place, n = inputs["mm_token_type_ids"][0].tolist().index(1), processor.image_processor.tokens_per_picture
    pixels = {name: tensor for name, tensor in inputs.items() if name.startswith("pixel")}
    ids, marks = inputs["input_ids"], inputs["mm_token_type_ids"]
    cache = model(input_ids=ids[:, :place]).past_key_values
    with pytest.raises(
        PromptError, match=rf"{place} positions of the prompt are cached already, with 0 .* room for 0, but 1 picture"
    ):
        model(input_ids=ids[:, -1:], mm_token_type_ids=marks[:, -1:], past_key_values=cache, **pixels)
    cache = model(input_ids=ids[:, : place + 3]).past_key_values
    with pytest.raises(
        PromptError, match=f"the cache ends within a picture, after 3 image tokens: a picture takes {n}"
    ):
        model(input_ids=ids[:, place + 3 :], mm_token_type_ids=marks, past_key_values=cache, **pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name, backend", [("standard", "aot_eager"), ("hd", "eager"), ("mgm-gemma", "eager")])
def test_the_whole_model_is_one_graph(name, backend):
    """The whole model is one graph, as `_can_compile_fullgraph` says. Places are checked when the graph runs.

    Dynamo records each model; AOTAutograd, which takes as long again and sees the same operators, records one of them.
    """
    found = family(name)
    inputs = dict(found.processor(text=prompt("What?"), images=found.pictures[0], return_tensors="pt"))
    compiled = torch.compile(found.model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, found.model(**inputs).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(
            RuntimeError, match="number of picture places in the prompt differs from that of image tokens"
        ):
            compiled(**{**inputs, "mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])})


def test_only_the_last_positions_logits_in_prefill(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    try:
        model.generate(**inputs, **GREEDY)
    finally:
        hook.remove()
    assert set(shapes) == {1}


def test_pictures_that_do_not_match_their_places(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    n = processor.image_processor.tokens_per_picture
    text_only = processor(text=prompt("What?", 0), return_tensors="pt")
    pixels = {k: v for k, v in inputs.items() if k.startswith("pixel")}
    with pytest.raises(PromptError, match=rf"room for 0 image tokens, but 1 picture\(s\) of {n} came"):
        model.generate(**text_only, **pixels, **GREEDY)
    with pytest.raises(PromptError, match=rf"room for {n} image tokens, but 2 picture\(s\) of {n} came"):
        model.generate(**{**inputs, **{k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in pixels.items()}}, **GREEDY)
    with pytest.raises(PromptError, match="marks places of pictures, but no pixel_values"):
        model.generate(**{k: v for k, v in inputs.items() if not k.startswith("pixel")}, **GREEDY)
    with pytest.raises(PromptError, match="without mm_token_type_ids"):
        model.generate(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}, **GREEDY)
    with pytest.raises(
        ValueError, match=r"pixel_values: expected \[1, 1, 3, 70, 70\] for 1 picture\(s\), got \[1, 1, 3, 64, 64\]"
    ):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][..., :64, :64]})
    with pytest.raises(ValueError, match="without pixel_values_hr"):
        model(**{k: v for k, v in inputs.items() if k != "pixel_values_hr"})


@pytest.fixture
def short(model, monkeypatch):
    """The model with a trained length of 40 tokens and 60 positions in all."""
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", 40)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 60)
    # The model warns once in its life, and other tests share the model.
    monkeypatch.setattr(model, "_warned_of_length", False)
    return model


def tokens(n):
    return {"input_ids": torch.full((1, n), 7), "attention_mask": torch.ones(1, n, dtype=torch.long)}


def test_lengths(short, caplog):
    assert len(ids_of(short, tokens(40))[0]) > 0
    with pytest.raises(
        PromptError, match="the prompt has 41 tokens, the model was trained on at most 40.*allow_long=True"
    ):
        short.generate(**tokens(41), **GREEDY)
    with pytest.raises(PromptError, match="the prompt has 41 tokens"):
        short(**tokens(41))
    with caplog.at_level("WARNING"):
        for _ in range(2):
            short.generate(**tokens(41), **GREEDY, allow_long=True)
    assert sum("41 tokens" in record.message for record in caplog.records) == 1
    with pytest.raises(PromptError, match="the prompt has 61 tokens, the model has 60 positions"):
        short(**tokens(61), allow_long=True)
    with pytest.raises(
        PromptError,
        match="50 prompt tokens and max_new_tokens=12 need 62 positions, the model has 60 .*at most 10 new tokens fit",
    ):
        short.generate(**tokens(50), **GREEDY, allow_long=True)


def test_decoding_may_pass_the_trained_length(short):
    out = short.generate(**tokens(38), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape[1] == 46


def test_gradients_reach_every_trained_part(standard, processor, photo):
    """Stage two trains mining, projector and language model. Both towers are frozen in it but can be trained."""
    model = MiniGeminiForConditionalGeneration.from_pretrained(standard).train()
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    # Layers after the selected CLIP layer do not contribute to the answer.
    assert all(
        name.startswith(("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm."))
        for name in without
    ), without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_transformers_pipeline(standard, photo):
    from transformers import pipeline as transformers_pipeline

    pipe = transformers_pipeline("image-text-to-text", model=str(standard))
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(photo)},
                {"type": "text", "text": "What is written in the picture?"},
            ],
        }
    ]
    reply = pipe(text=messages, max_new_tokens=12, generate_kwargs={"do_sample": False}, return_full_text=False)[0][
        "generated_text"
    ]
    ours = mg_fast.load(standard).chat("What is written in the picture?", [photo], max_new_tokens=12).text
    assert reply.strip() == ours


def test_peft_lora_on_the_language_model(standard, processor, photo, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = MiniGeminiForConditionalGeneration.from_pretrained(standard)
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    before = ids_of(base, inputs)
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    tuned = get_peft_model(base, config).eval()
    adapted = ids_of(tuned, inputs)
    assert adapted != before, "a random adapter changes the answer"
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MiniGeminiForConditionalGeneration.from_pretrained(standard), tmp_path).eval()
    assert ids_of(again, inputs) == adapted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(standard, processor, photo, dtype):
    model = MiniGeminiForConditionalGeneration.from_pretrained(standard, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = model(**processor(text=prompt("What?"), images=photo, return_tensors="pt")).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.slow
def test_compiled_forward_gives_the_same(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    core = model.model
    with torch.inference_mode():
        expected = core.get_image_features(inputs["pixel_values"], inputs["pixel_values_hr"]).pooler_output
    compiled = torch.compile(
        lambda low, high: core.get_image_features(low, high).pooler_output, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        result = compiled(inputs["pixel_values"], inputs["pixel_values_hr"])
    assert torch.allclose(result, expected, atol=1e-5)


def test_chunked_prefill_is_refused_with_pictures(model, processor, photo):
    """Chunked prefill, which cuts a prompt without regard to its pictures, is refused with pictures."""
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    with pytest.raises(PromptError, match="cannot be used with pictures"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=8)
    text = processor(text=prompt("Hello there", 0), return_tensors="pt")
    assert ids_of(model, text, prefill_chunk_size=8) == ids_of(model, text)


def test_beams_tell_of_missing_places_as_greedy_does(model, processor, photo):
    inputs = dict(processor(text=prompt("What?"), images=photo, return_tensors="pt"))
    with pytest.raises(PromptError, match="without mm_token_type_ids"):
        model.generate(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}, **GREEDY, num_beams=2)
    twice = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in inputs.items() if k.startswith("pixel")}
    with pytest.raises(PromptError, match=r"room for 25 image tokens, but 2 picture\(s\)"):
        model.generate(**{**inputs, **twice}, **GREEDY, num_beams=2)


def test_max_length_counts_too(short):
    with pytest.raises(PromptError, match="need 90 positions, the model has 60"):
        short.generate(**tokens(30), max_length=90, do_sample=False)


def test_tuples_where_asked_for(model, processor, photo):
    inputs = processor(text=prompt("What?"), images=photo, return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def test_image_features_take_a_backend_and_nothing_unknown(model, processor, photo):
    inputs = processor.image_processor(photo)
    with torch.inference_mode():
        plain, fast = (
            model.get_image_features(**inputs, backend=backend).pooler_output for backend in ("reference", "auto")
        )
    assert not torch.equal(plain, fast) and torch.allclose(plain, fast, atol=1e-5)
    with pytest.raises(mg_fast.BackendError, match="triton"):
        model.get_image_features(**inputs, backend="triton")
    with pytest.raises(TypeError, match="nonsense"):
        model.get_image_features(**inputs, nonsense=1)
