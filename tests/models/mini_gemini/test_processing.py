"""Prompts and pictures become model inputs, chat templates render, and the processor survives a round trip to disk."""

import base64
import copy
import io
import json

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from mg_fast import CheckpointError, MiniGeminiProcessor, PictureError, PromptError
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.templates import TEMPLATES, detect_template, get_template, render, stop_ids, with_picture_tags

# Numbers of image tokens of the tiny checkpoints: 5x5 patches, and five times as many in HD.
STANDARD, HD = 25, 125
QUESTION = "USER: <image>\nWhat is it? ASSISTANT:"


def by_hand(processor, prompt, tokens):
    """Ids and marks as the original makes them: piece by piece, with only the first beginning-of-sequence token."""
    filler = processor.tokenizer.unk_token_id
    ids, marks = [], []
    for i, piece in enumerate(prompt.split("<image>")):
        text = processor.tokenizer(piece).input_ids
        assert text[0] == processor.tokenizer.bos_token_id
        if i:
            ids += [filler] * tokens
            marks += [1] * tokens
            text = text[1:]
        ids += text
        marks += [0] * len(text)
    return ids, marks


# ---- From prompts to ids


@pytest.mark.parametrize(
    "prompt, pictures", [("Hello there.", 0), (QUESTION, 1), ("<image>", 1), ("a<image>b<image><image>", 3)]
)
def test_ids_are_made_piece_by_piece(processor, hd_processor, photo, prompt, pictures):
    for one, tokens in ((processor, STANDARD), (hd_processor, HD)):
        ids, marks = by_hand(one, prompt, tokens)
        found = one(text=prompt, images=[photo] * pictures)
        assert found["input_ids"] == [ids]
        assert found["mm_token_type_ids"] == [marks]
        assert found["attention_mask"] == [[1] * len(ids)]
        assert one.encode(prompt) == (ids, marks)
        assert ids.count(one.tokenizer.bos_token_id) == 1 and sum(marks) == pictures * tokens


def test_the_pieces_around_a_picture_begin_with_sentencepieces_prefix(processor):
    """The ids read ... : ▁ [picture] ▁ <0x0A> ..., as in the original's tokenization of the trained prompts."""
    ids, marks = processor.encode("USER: <image>\nWhat?")
    start, end = marks.index(1), len(marks) - 1 - marks[::-1].index(1)
    tokens = processor.tokenizer.convert_ids_to_tokens
    assert tokens(ids[start - 2 : start]) == [":", "▁"]
    assert tokens(ids[end + 1 : end + 3]) == ["▁", "<0x0A>"]
    assert tokens(ids[0]) == "<s>"
    assert set(ids[start : end + 1]) == {processor.filler_id} == {processor.tokenizer.unk_token_id}


def test_without_special_tokens_nothing_is_dropped(processor):
    def tokens(text):
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    for before, after in (("<s>USER: ", "\nWhat?"), ("USER: ", "What?")):
        ids, marks = processor.encode(f"{before}<image>{after}", add_special_tokens=False)
        assert ids == tokens(before) + [processor.filler_id] * STANDARD + tokens(after)
        found = processor(text=f"{before}<image>{after}", images=Image.new("RGB", (9, 9)), add_special_tokens=False)
        assert (found["input_ids"], found["mm_token_type_ids"]) == ([ids], [marks])


def test_a_tokenizer_that_adds_no_bos(standard, processor):
    """With a tokenizer that adds no BOS, such as Yi's, nothing is dropped from the pieces."""
    tokenizer = AutoTokenizer.from_pretrained(standard, add_bos_token=False)
    bare = MiniGeminiProcessor(processor.image_processor, tokenizer, template="chatml_direct")
    with_bos, _ = processor.encode(QUESTION)
    assert bare.encode(QUESTION)[0] == with_bos[1:]


def test_filler(processor):
    """The filler is unk, or else Llama-3's reserved token, or else a pad token that is not eos."""

    def filler(**changes):
        tokenizer = copy.deepcopy(processor.tokenizer)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return MiniGeminiProcessor(processor.image_processor, tokenizer, template="vicuna_v1").filler_id

    assert filler() == 0
    assert filler(unk_token=None, pad_token="<s>") == 1
    reserved = copy.deepcopy(processor.tokenizer)
    reserved.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    reserved.unk_token, reserved.pad_token = None, "<s>"
    assert MiniGeminiProcessor(processor.image_processor, reserved, template="llama_3").filler_id == 400
    for pad in (None, "</s>"):
        with pytest.raises(CheckpointError, match="no unk, reserved or pad token that could mark a picture's places"):
            filler(unk_token=None, pad_token=pad)


# ---- Batches


def test_ragged_batches_are_padded_on_the_left(processor, photo):
    texts = ["Hi", QUESTION, "Tell me a rather long story about <image> and <image>."]
    found = processor(text=texts, images=[[], [photo], [photo, photo]], return_tensors="pt")
    rows = [by_hand(processor, text, STANDARD) for text in texts]
    longest = max(len(ids) for ids, _ in rows)
    assert found["input_ids"].shape == found["attention_mask"].shape == found["mm_token_type_ids"].shape == (3, longest)
    for i, (ids, marks) in enumerate(rows):
        gap = longest - len(ids)
        assert found["input_ids"][i].tolist() == [processor.tokenizer.pad_token_id] * gap + ids
        assert found["attention_mask"][i].tolist() == [0] * gap + [1] * len(ids)
        assert found["mm_token_type_ids"][i].tolist() == [0] * gap + marks
    assert found["pixel_values"].shape == (3, 1, 3, 70, 70) and found["pixel_values_hr"].shape == (3, 3, 160, 160)


def test_padding_is_the_callers_to_choose(processor):
    texts = ["Hi", "Hello there, general."]
    lengths = [len(processor.tokenizer(text).input_ids) for text in texts]
    assert lengths[0] < lengths[1]
    for padding in (None, True, "longest"):
        assert [len(ids) for ids in processor(text=texts, padding=padding)["input_ids"]] == [lengths[1]] * 2
    for padding in (False, "do_not_pad"):
        assert [len(ids) for ids in processor(text=texts, padding=padding)["input_ids"]] == lengths
        with pytest.raises(PromptError, match="prompts of different lengths cannot be one tensor: pass padding=True"):
            processor(text=texts, padding=padding, return_tensors="pt")
    assert processor(text=texts[:1] * 2, padding=False, return_tensors="pt")["input_ids"].shape == (2, lengths[0])


def test_pictures_may_come_flat_or_by_prompt(processor, photo, drawing):
    texts = [QUESTION, "No picture.", "<image> or <image>?"]
    other = Image.open(photo).convert("RGB").rotate(90)
    flat = processor(text=texts, images=[photo, drawing, other], return_tensors="pt")
    for images in ([[photo], [], [drawing, other]], ((photo,), (), (drawing, other))):
        nested = processor(text=texts, images=images, return_tensors="pt")
        assert (
            flat.keys()
            == nested.keys()
            == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "pixel_values_hr"}
        )
        assert all(torch.equal(flat[key], nested[key]) for key in flat)
    for i, image in enumerate((photo, drawing, other)):
        assert torch.equal(flat["pixel_values_hr"][i], processor.image_processor(image)["pixel_values_hr"][0])


def test_one_picture_needs_no_list(processor, photo):
    expected = processor(text=QUESTION, images=[photo], return_tensors="pt")
    for images in (
        photo,
        str(photo),
        Image.open(photo),
        photo.read_bytes(),
        np.asarray(Image.open(photo)),
        [[photo]],
        (photo,),
    ):
        found = processor(text=QUESTION, images=images, return_tensors="pt")
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_text_only(processor):
    for images in (None, [], [[]]):
        found = processor(text="Hello.", images=images, return_tensors="pt")
        assert found.keys() == {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert found["mm_token_type_ids"].sum() == 0
    assert processor(text=["Hello.", "Hi."])["input_ids"][0] == by_hand(processor, "Hello.", 0)[0]


def test_return_tensors(processor, photo):
    lists, arrays, torches = (
        processor(text=QUESTION, images=photo, return_tensors=kind) for kind in (None, "np", "pt")
    )
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert (
            isinstance(lists[key], list)
            and isinstance(arrays[key], np.ndarray)
            and isinstance(torches[key], torch.Tensor)
        )
        assert lists[key] == arrays[key].tolist() == torches[key].tolist()
        assert torches[key].dtype == torch.int64
    for key in ("pixel_values", "pixel_values_hr"):
        assert isinstance(arrays[key], np.ndarray) and isinstance(torches[key], torch.Tensor)
        assert arrays[key].dtype == np.float32 and np.array_equal(arrays[key], torches[key].numpy())


def test_model_input_names_are_what_comes(processor, photo):
    assert set(processor.model_input_names) == processor(text=QUESTION, images=photo).keys()


# ---- Inputs that do not fit

MISMATCHES = [
    (QUESTION, 0, "the prompt has 1 <image> tag.s., but 0 picture.s. came"),
    (QUESTION, 2, "the prompt has 1 <image> tag.s., but 2 picture.s. came"),
    ("Hello.", 1, "the prompt has 0 <image> tag.s., but 1 picture.s. came"),
    ("<image><image>", 1, "the prompt has 2 <image> tag.s., but 1 picture.s. came"),
    ([QUESTION, "Hello."], 2, "the prompts have 1 <image> tag.s., but 2 picture.s. came"),
    ([QUESTION, QUESTION], 1, "the prompts have 2 <image> tag.s., but 1 picture.s. came"),
]


@pytest.mark.parametrize("text, pictures, message", MISMATCHES)
def test_as_many_pictures_as_tags(processor, photo, text, pictures, message):
    with pytest.raises(PromptError, match=f"^{message}"):
        processor(text=text, images=[photo] * pictures)
    if pictures == 0:
        with pytest.raises(PromptError, match=f"^{message}"):
            processor(text=text)


def test_as_many_pictures_as_tags_in_every_prompt(processor, photo):
    """Equal totals are not enough: the picture of one prompt must not go to another."""
    with pytest.raises(PromptError, match="prompt 1 of 2 has 1 <image> tag.s., but 2 picture.s. came"):
        processor(text=[QUESTION, QUESTION], images=[[photo, photo], []])
    with pytest.raises(PromptError, match="prompt 2 of 2 has 1 <image> tag.s., but 0 picture.s. came"):
        processor(text=["Hi", QUESTION], images=[[], []])


def test_pictures_are_counted_before_they_are_read(processor):
    with pytest.raises(PromptError, match="2 <image> tag"):
        processor(text="<image><image>", images=["/nonexistent/picture.png"])


def test_bad_pictures_are_numbered_over_the_batch(processor, photo):
    with pytest.raises(PictureError, match="^picture 2 of 2: /nonexistent/picture.png: no such file"):
        processor(text=[QUESTION, QUESTION], images=[[photo], ["/nonexistent/picture.png"]])
    with pytest.raises(PictureError, match="URLs are fetched only when asked for"):
        processor(text=QUESTION, images="https://example.invalid/a.png")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "prompt 1 of 1 is empty: ''"),
        (["Hi", " \n"], "prompt 2 of 2 is empty"),
        ([], "expected at least one prompt"),
    ],
)
def test_empty_prompts(processor, text, message):
    with pytest.raises(PromptError, match=message):
        processor(text=text)


def test_no_text(processor, photo):
    with pytest.raises(PromptError, match="expected text=, a prompt with one <image> per picture"):
        processor(images=photo)


def test_arguments_that_would_be_ignored_are_refused(processor):
    with pytest.raises(TypeError, match="truncation is not offered"):
        processor(text="Hi", truncation=True)
    assert processor(text="Hi", truncation=False) == processor(text="Hi")
    with pytest.raises(TypeError, match=r"unknown arguments \['max_length', 'videos'\]"):
        processor(text="Hi", max_length=5, videos=[1])


# ---- Templates, written out by hand

LLAMA_3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.<|eot_id|>"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# The prompts of the turns ("<image>\nWhat is this?", "A cat.") and ("What colour?", None).
TWO_TURNS = {
    "vicuna_v1": VICUNA + "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT:",
    "gemma": "<start_of_turn>user\n<image>\nWhat is this?<end_of_turn>\n"
    "<start_of_turn>model\nA cat.<end_of_turn>\n<eos>"
    "<start_of_turn>user\nWhat colour?<end_of_turn>\n<start_of_turn>model\n",
    "mistral_instruct": "[INST] <image>\nWhat is this? [/INST] A cat. </s><s>[INST] What colour? [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|>"
    "<|im_start|>user\n<image>\nWhat is this?<|im_end|>"
    "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhat colour?<|im_end|><|im_start|>assistant\n",
    "llama_3": LLAMA_3 + "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat colour?<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\n",
}
# The prompts of the turn ("<image>\n<image>\nCompare.", None).
TWO_PICTURES = {
    "vicuna_v1": VICUNA + "USER: Image 1:<image>\nImage 2:<image>\nCompare. ASSISTANT:",
    "gemma": "<start_of_turn>user\nImage 1:<image>\nImage 2:<image>\nCompare.<end_of_turn>\n<start_of_turn>model\n",
    "mistral_instruct": "[INST] Image 1:<image>\nImage 2:<image>\nCompare. [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|>"
    "<|im_start|>user\nImage 1:<image>\nImage 2:<image>\nCompare.<|im_end|><|im_start|>assistant\n",
    "llama_3": LLAMA_3
    + "<|start_header_id|>user<|end_header_id|>\n\nImage 1:<image>\nImage 2:<image>\nCompare.<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\n",
}


@pytest.fixture(scope="module")
def templated(standard):
    return {name: MiniGeminiProcessor.from_pretrained(standard, template=name) for name in TEMPLATES}


def test_all_templates_are_here():
    assert TWO_TURNS.keys() == TWO_PICTURES.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", TWO_TURNS)
def test_render(name):
    assert render(name, [("<image>\nWhat is this?", "A cat."), ("What colour?", None)]) == TWO_TURNS[name]
    assert render(name, [("<image>\n<image>\nCompare.", None)]) == TWO_PICTURES[name]


@pytest.mark.parametrize("name", TWO_TURNS)
def test_chat_template(templated, name):
    """Messages give the same prompt, with pictures as tags in the text or as separate parts."""
    picture, answer, more = (
        {"type": "image"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour?"},
    )
    apply = templated[name].apply_chat_template
    for content in ("<image>\nWhat is this?", [picture, text("What is this?")], [text("What is this?"), picture]):
        messages = [{"role": "user", "content": content}, answer, more]
        assert apply(messages, add_generation_prompt=True) == TWO_TURNS[name]
    answer["content"] = [text("A cat.")]
    assert apply(messages, add_generation_prompt=True) == TWO_TURNS[name]
    assert apply([messages, messages], add_generation_prompt=True) == [TWO_TURNS[name]] * 2
    for content in ("<image>\n<image>\nCompare.", [picture, picture, text("Compare.")]):
        assert apply([{"role": "user", "content": content}], add_generation_prompt=True) == TWO_PICTURES[name]
    assert apply(messages[:2]) == render(name, [("<image>\nWhat is this?", "A cat.")])


def text(value):
    return {"type": "text", "text": value}


def test_pictures_are_numbered_through_the_whole_conversation():
    prompt = render("mistral_instruct", [("<image>\nFirst?", "Yes."), ("<image>\nSecond?", None)])
    assert prompt == "[INST] Image 1:<image>\nFirst? [/INST] Yes. </s><s>[INST] Image 2:<image>\nSecond? [/INST]"


def test_a_finished_conversation_asks_for_nothing():
    assert render("vicuna_v1", [("Hi", "Hello.")]) == VICUNA + "USER: Hi ASSISTANT: Hello.</s>"


def test_texts_are_put_in_as_they_are(templated):
    odd = "{} {0} {{ x }} \\n 'quoted' \\"
    expected = f"Sys {odd} USER: {odd} ASSISTANT: {odd}</s>"
    assert render("vicuna_v1", [(odd, odd)], system=f"Sys {odd}") == expected
    messages = [
        {"role": role, "content": content}
        for role, content in (("system", f"Sys {odd}"), ("user", odd), ("assistant", odd))
    ]
    assert templated["vicuna_v1"].apply_chat_template(messages) == expected


@pytest.mark.parametrize("name", TWO_TURNS)
def test_system_text_is_replaced_or_refused(templated, name):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = {
        "vicuna_v1": "Be brief. USER: Hi ASSISTANT:",
        "chatml_direct": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
        "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n",
    }
    if name in expected:
        assert render(name, [("Hi", None)], system="Be brief.") == expected[name]
        assert templated[name].apply_chat_template(messages, add_generation_prompt=True) == expected[name]
        return
    with pytest.raises(PromptError, match=f"template {name} has no system text, got 'Be brief.'"):
        render(name, [("Hi", None)], system="Be brief.")
    with pytest.raises(TemplateError, match=f"template {name} has no system text"):
        templated[name].apply_chat_template(messages)


RENDER_ERRORS = [
    (
        "nosuch",
        [("Hi", None)],
        "unknown template 'nosuch': expected one of vicuna_v1, gemma, mistral_instruct, chatml_direct, llama_3",
    ),
    ("gemma", [], "at least one .* turn, got none"),
    ("gemma", [("", None)], "turn 1 of 1: expected a user text, got ''"),
    ("gemma", [("Hi", "Hello."), (" \n", None)], r"turn 2 of 2: expected a user text, got ' \\n'"),
    ("gemma", [(None, "Hello.")], "turn 1 of 1: expected a user text, got None"),
    ("gemma", [("Hi", None), ("Hi?", None)], "turn 1 of 2 has no answer; only the last turn may be open"),
]


@pytest.mark.parametrize("name, turns, message", RENDER_ERRORS)
def test_render_errors(name, turns, message):
    with pytest.raises(PromptError, match=message):
        render(name, turns)


def test_unknown_template(standard, processor):
    message = "unknown template 'nosuch': expected one of vicuna_v1, gemma, mistral_instruct, chatml_direct, llama_3"
    with pytest.raises(PromptError, match=message):
        MiniGeminiProcessor.from_pretrained(standard, template="nosuch")
    with pytest.raises(PromptError, match=message):
        MiniGeminiProcessor(processor.image_processor, processor.tokenizer, template="nosuch")
    with pytest.raises(PromptError, match=message):
        get_template("nosuch")


def test_picture_tags_are_put_before_a_text_without_any():
    assert with_picture_tags("What?", 0) == "What?"
    assert with_picture_tags("What?", 2) == "<image>\n<image>\nWhat?"
    assert with_picture_tags("Is <image> it?", 1) == "Is <image> it?"


class Tokenizer:
    """The members of a tokenizer that the templates use."""

    def __init__(self, tokens, size, eos=None):
        self.tokens, self.size, self.eos_token_id = tokens, size, eos

    def get_vocab(self):
        return self.tokens

    def __len__(self):
        return self.size


LLAMA_3_TOKENS = {
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "<|end_of_text|>": 128001,
}
CHATML_TOKENS = {"<|im_start|>": 6, "<|im_end|>": 7, "</s>": 2, "<|endoftext|>": 5}
VICUNA_TOKENS = {"<s>": 1, "</s>": 2}
GEMMA_TOKENS = {"<eos>": 1, "<bos>": 2, "<start_of_turn>": 106, "<end_of_turn>": 107}
FAMILIES = [
    ("gemma", Tokenizer(GEMMA_TOKENS, 256000), ("gemma", True)),
    ("mixtral", Tokenizer(VICUNA_TOKENS, 32000), ("mistral_instruct", True)),
    ("mistral", Tokenizer(VICUNA_TOKENS, 32000), ("mistral_instruct", True)),
    ("llama", Tokenizer(LLAMA_3_TOKENS, 128256), ("llama_3", True)),
    ("llama", Tokenizer(CHATML_TOKENS, 64002), ("chatml_direct", True)),
    ("llama", Tokenizer(VICUNA_TOKENS, 32000), ("vicuna_v1", True)),
    # Nothing tells the template of a Vicuna with an added token, or of a Yi base model without its chat tokens.
    ("llama", Tokenizer(VICUNA_TOKENS, 32001), ("vicuna_v1", False)),
    ("llama", Tokenizer({**VICUNA_TOKENS, "<|im_start|>": 6}, 64000), ("vicuna_v1", False)),
]


@pytest.mark.parametrize("text_model_type, tokenizer, expected", FAMILIES)
def test_detect_template(text_model_type, tokenizer, expected):
    assert detect_template(text_model_type, tokenizer) == expected


STOPS = [
    ("vicuna_v1", Tokenizer(VICUNA_TOKENS, 32000, eos=2), [2]),
    ("gemma", Tokenizer(GEMMA_TOKENS, 256000, eos=1), [1, 107]),
    ("mistral_instruct", Tokenizer(VICUNA_TOKENS, 32000, eos=2), [2]),
    ("chatml_direct", Tokenizer(CHATML_TOKENS, 64002, eos=7), [7]),
    ("chatml_direct", Tokenizer(CHATML_TOKENS, 64002, eos=2), [2, 7]),
    ("llama_3", Tokenizer(LLAMA_3_TOKENS, 128256, eos=128009), [128001, 128009]),
    ("vicuna_v1", Tokenizer({}, 100), []),
]


@pytest.mark.parametrize("template, tokenizer, expected", STOPS)
def test_stop_ids(template, tokenizer, expected):
    assert stop_ids(template, tokenizer) == expected


# ---- From messages to model inputs


def as_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


def conversation(*parts):
    return [{"role": "user", "content": [*parts, text("What is it?")]}]


PARTS = {
    "Pillow image": lambda path: {"type": "image", "image": Image.open(path)},
    "array": lambda path: {"type": "image", "image": np.asarray(Image.open(path))},
    "path under image": lambda path: {"type": "image", "image": str(path)},
    "path": lambda path: {"type": "image", "path": str(path)},
    "Path": lambda path: {"type": "image", "path": path},
    "path under url": lambda path: {"type": "image", "url": str(path)},
    "base64": lambda path: {"type": "image", "base64": as_base64(path)},
    "data url under base64": lambda path: {"type": "image", "base64": f"data:image/png;base64,{as_base64(path)}"},
    "data url": lambda path: {"type": "image", "url": f"data:image/png;base64,{as_base64(path)}"},
    "OpenAI's way": lambda path: {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{as_base64(path)}"},
    },
    "OpenAI's way, short": lambda path: {"type": "image_url", "image_url": f"data:image/png;base64,{as_base64(path)}"},
}
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", PARTS)
def test_pictures_of_messages(processor, photo, kind):
    expected = processor(text=render("vicuna_v1", [("<image>\nWhat is it?", None)]), images=photo, return_tensors="pt")
    messages = conversation(PARTS[kind](photo))
    assert same(processor.apply_chat_template(messages, **TOKENIZED), expected)
    assert (
        processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        == expected["input_ids"].tolist()
    )


def test_pictures_of_several_turns_keep_their_order(processor, photo, drawing):
    messages = [
        {"role": "user", "content": [{"type": "image", "path": photo}, text("First?")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [text("Second?"), {"type": "image", "path": drawing}]},
    ]
    prompt = render("vicuna_v1", [("<image>\nFirst?", "Yes."), ("<image>\nSecond?", None)])
    expected = processor(text=prompt, images=[photo, drawing], return_tensors="pt")
    assert same(processor.apply_chat_template(messages, **TOKENIZED), expected)


def test_batches_of_conversations(processor, photo, drawing):
    batch = [
        conversation({"type": "image", "path": photo}),
        [{"role": "user", "content": "Hello."}],
        conversation({"type": "image", "path": drawing}),
    ]
    prompts = [
        render("vicuna_v1", [(question, None)])
        for question in ("<image>\nWhat is it?", "Hello.", "<image>\nWhat is it?")
    ]
    expected = processor(text=prompts, images=[[photo], [], [drawing]], return_tensors="pt")
    assert same(processor.apply_chat_template(batch, **TOKENIZED), expected)


def test_text_only_messages(processor):
    found = processor.apply_chat_template([{"role": "user", "content": "Hello."}], **TOKENIZED)
    assert same(found, processor(text=render("vicuna_v1", [("Hello.", None)]), return_tensors="pt"))


def test_callers_messages_are_left_alone(processor, photo):
    parts = [make(photo) for kind, make in PARTS.items() if kind not in ("Pillow image", "array")]
    for tokenized in (TOKENIZED, {}):
        for messages in (conversation(*parts), [conversation(*parts)]):
            before = copy.deepcopy(messages)
            processor.apply_chat_template(messages, **tokenized)
            assert messages == before


BAD_PARTS = [
    ({"type": "image"}, PromptError, r"a message's picture needs one of image, path, url or base64, got \['type'\]"),
    ({"type": "image", "image": None, "file": "x"}, PromptError, "needs one of image, path, url or base64"),
    ({"type": "image", "path": "/nonexistent/a.png"}, PictureError, "/nonexistent/a.png: no such file"),
    ({"type": "image", "image": "https://example.invalid/a.png"}, PictureError, "URLs are fetched only when asked for"),
    ({"type": "image", "path": "https://example.invalid/a.png"}, PictureError, "URLs are fetched only when asked for"),
    ({"type": "image", "base64": "no picture at all"}, PictureError, "data:image;base64,no picture at all: "),
    ({"type": "image", "image": 7}, PictureError, "got int"),
]


@pytest.mark.parametrize("part, error, message", BAD_PARTS)
def test_bad_pictures_of_messages(processor, part, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(conversation(part), **TOKENIZED)


def test_sixteen_bit_pictures_of_messages(processor):
    """16-bit pictures keep their high byte, given by base64 as well as by path."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (9, 9), dtype=np.uint16)).save(buffer, "PNG")
    part = {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode()}
    found = processor.apply_chat_template(conversation(part), **TOKENIZED)
    assert torch.equal(found["pixel_values_hr"], processor.image_processor(buffer.getvalue())["pixel_values_hr"])


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant"],
        ["user", "user"],
        ["user", "assistant", "assistant"],
        ["user", "system"],
        ["user", "tool"],
        ["human"],
    ],
)
def test_roles_out_of_order(processor, roles):
    with pytest.raises(TemplateError, match="roles must alternate user, assistant, user"):
        processor.apply_chat_template([{"role": role, "content": "Hi"} for role in roles])


# ---- To disk and back


@pytest.mark.parametrize("template", [None, "llama_3"])
def test_round_trip_of_the_processor_alone(standard, hd, photo, tmp_path, template):
    for folder in (standard, hd):
        before = MiniGeminiProcessor.from_pretrained(folder, template=template)
        before.save_pretrained(tmp_path / folder.name)
        assert not (tmp_path / folder.name / "config.json").exists()
        for after in (
            MiniGeminiProcessor.from_pretrained(tmp_path / folder.name),
            AutoProcessor.from_pretrained(tmp_path / folder.name),
        ):
            assert after.template == before.template == (template or "vicuna_v1")
            assert after.image_processor.to_dict() == before.image_processor.to_dict()
            assert after.tokenizer.padding_side == "left" and after.filler_id == before.filler_id
            text = after.apply_chat_template(conversation({"type": "image"}), add_generation_prompt=True)
            assert text == render(before.template, [("<image>\nWhat is it?", None)])
            assert same(
                after(text=text, images=photo, return_tensors="pt"),
                before(text=text, images=photo, return_tensors="pt"),
            )


def test_round_trip_keeps_what_is_not_the_default(processor, tmp_path):
    images = MiniGeminiImageProcessor(
        hr_size=96, lr_size=42, grid=2, global_view=True, pad=False, tokens_per_picture=45
    )
    MiniGeminiProcessor(images, processor.tokenizer, template="gemma").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["template"] == "gemma"
    after = MiniGeminiProcessor.from_pretrained(tmp_path)
    assert after.template == "gemma" and after.image_processor.to_dict() == images.to_dict()
    assert MiniGeminiProcessor.from_pretrained(tmp_path, template="chatml_direct").template == "chatml_direct"
    with pytest.raises(PromptError, match="unknown template 'nosuch'"):
        MiniGeminiProcessor.from_pretrained(tmp_path, template="nosuch")


def test_from_pretrained_refuses_what_it_would_ignore(standard, tmp_path):
    with pytest.raises(TypeError, match=r"unknown arguments \['max_pixels'\]"):
        MiniGeminiProcessor.from_pretrained(standard, max_pixels=3)
    with pytest.raises(CheckpointError, match="has no config.json"):
        MiniGeminiProcessor.from_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(standard / file)
    with pytest.raises(CheckpointError, match="no tokenizer in .*: expected tokenizer.model or"):
        MiniGeminiProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("pad", [True, False])
def test_squared_pictures_give_the_same_pixels(processor, hd_processor, photo, drawing, pad):
    """Another process can make the pixels of 8-bit squares, to the last bit."""
    for images in (processor.image_processor, hd_processor.image_processor):
        images = MiniGeminiImageProcessor(*images.settings[:-1], pad=pad)
        squared = images.squared([photo, drawing])
        assert squared.dtype == torch.uint8 and squared.shape == (2, images.hr_size, images.hr_size, 3)
        expected, made = images([photo, drawing]), images.pixels_of(squared)
        assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
        assert 4 * squared.nbytes < sum(tensor.nbytes for tensor in expected.values())
    with pytest.raises(ValueError, match=r"squared: expected \[n, "):
        images.pixels_of(squared[0])
    with pytest.raises(PictureError, match="picture 2 of 2: .*no such file"):
        images.squared([photo, "nowhere.png"])
