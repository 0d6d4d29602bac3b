"""Pixels, ids and masks are the original's, pictures and prompts must agree, and the processor survives a saving."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from mg_fast import CheckpointError, PictureError, PromptError
from mg_fast.models.mm_interleaved.image_processing import PLACEHOLDER, MMInterleavedImageProcessor, drawn_pictures
from mg_fast.models.mm_interleaved.processing import MMInterleavedProcessor
from mg_fast.models.mm_interleaved.prompts import join_items, question
from mg_fast.models.mm_interleaved.tokenization import MMInterleavedTokenizer
from tests.models.mm_interleaved.recorded import NAMES, answers, folder_of, pixels, requests

# The texts behind the recorded ids. The recording holds them only as decoded ids.
TEXTS = {
    "vqa": [
        "Based on the image, please answer the question. <image>What color is the cat under the table? "
        "Please provide an accurate answer within one word. The answer is:"
    ],
    "caption": ["<image> a photo of"] * 2,
    "fewshot": [
        "<image>Question: Is there a red boat near the house? Short answer: yes"
        "<image>Question: How many birds are on the tree? Short answer:"
    ],
    "textonly": ["A small dog waits near the old boat. <image> It is", "What color is the moon?"],
    "ragged": [
        "A photo of a round lamp: <image>What is behind the door?",
        "<image>A quiet street. <image>The stone stands on the bridge. What is next?",
    ],
    "twodocs": ["one <s> two <image> three</s><s><image>A new door opens"],
    "t2i": ["a red cat sits on the small table, near the window. <image>"],
    "t2i_batch": ["a bright star shines above the hill <image>", "two boats <image>"],
    "segm": ["<image>a street with a tree and a house.<image>"],
    "story": [
        "A dog runs. <image> It stops under the tree. <image> Then the moon shines. <image>",
        "<image> A black hat <image>",
    ],
    "sampled": ["<image>Describe the picture:"],
    "scores": ["<image> caption: a cat on a chair. question: is it red? answer:"],
}
DRAWN = ("t2i", "t2i_batch", "segm", "story")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    name = request.param
    return name, MMInterleavedProcessor.from_pretrained(folder_of(name)), requests(name), answers(name)


@pytest.fixture(scope="module")
def processor():
    return MMInterleavedProcessor.from_pretrained(folder_of("mmi-tiny"))


def sources(name, pictures):
    """Pictures as a caller passes them, for their numbers in the recording."""
    return [PLACEHOLDER if i == "grey" else folder_of(name) / f"image{i}.png" for i in pictures]


# ---- The original's bits


def test_every_recorded_request(case):
    name, processor, asked, recorded = case
    assert {request for request in asked if f"{request}.text_ids" in recorded} == TEXTS.keys()
    for request, texts in TEXTS.items():
        images = asked[request]["images"]
        side = "right" if request in DRAWN else "left"
        given = [sources(name, row) for row in images]
        found = processor(text=texts, images=given, return_tensors="pt", padding_side=side)
        assert torch.equal(found["input_ids"], recorded[f"{request}.text_ids"]), request
        for key in ("attention_mask", "num_image_per_seq"):
            if f"{request}.{key}" in recorded:
                assert torch.equal(found[key], recorded[f"{request}.{key}"]), (request, key)
        flat = [picture for row in images for picture in row]
        assert torch.equal(found["pixel_values"], pixels(name, flat, recorded)), request
        assert found["pixel_values"].dtype == torch.float32
    items = question(folder_of(name) / "image0.png", "What color is the cat under the table?")
    text, pictures = join_items(items)
    found = processor(text=text, images=pictures, return_tensors="pt")
    assert torch.equal(found["input_ids"], recorded["vqa.text_ids"])


def test_a_picture_to_draw_is_put_behind_every_prompt(case):
    name, processor, asked, recorded = case
    texts = ["A dog runs. <image> It stops under the tree. <image> Then the moon shines.", "<image> A black hat"]
    found = processor(text=texts, images=sources(name, [0, 1, 2]), draw=True, return_tensors="pt")
    for key, expected in (("input_ids", "text_ids"), ("attention_mask", "attention_mask")):
        assert torch.equal(found[key], recorded[f"story.{expected}"])
    assert found["num_image_per_seq"].tolist() == [3, 2]
    assert torch.equal(found["pixel_values"], pixels(name, [0, 1, "grey", 2, "grey"], recorded))


def test_drawn_pictures_are_fed_back_as_in_the_original(case):
    _, processor, _, recorded = case
    fed = [key for key in recorded if key.endswith("last_pixels")]
    assert len(fed) >= 3
    for key in fed:
        loop, number = key.removesuffix(".last_pixels").split(".round")
        drawn = drawn_pictures(recorded[f"{loop}.round{int(number) - 1}.picture"])
        assert torch.equal(processor.image_processor(drawn).pixel_values[0] * 255, recorded[key].float()), key


def test_text_of_ids_is_the_originals(case):
    _, processor, asked, recorded = case
    for request, content in asked.items():
        if "prompt" in content and "images" in content:
            ids = [
                [id for id in row if id != processor.pad_token_id] for row in recorded[f"{request}.text_ids"].tolist()
            ]
            assert processor.batch_decode(ids) == content["prompt"]
        for variant, generation in content.get("generations", {}).items() if isinstance(content, dict) else ():
            if "text" in generation:
                ids = recorded[f"{request}.{variant}.ids"]
                assert processor.batch_decode(ids, skip_special_tokens=True) == generation["text"]


# ---- Pictures


def scaled_by_hand(image):
    """Section 1 of the original's preparation, with NumPy's crop."""
    while min(image.size) >= 448:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = 224 / min(image.size)
    array = np.array(
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    ).astype(np.float32)
    top, left = (array.shape[0] - 224) // 2, (array.shape[1] - 224) // 2
    return array[top : top + 224, left : left + 224].transpose(2, 0, 1) / 255.0


@pytest.mark.parametrize("size", [(640, 480), (449, 1801), (224, 224), (223, 31), (1, 200), (900, 897)])
def test_any_size(size):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = MMInterleavedImageProcessor()(noise).pixel_values[0].numpy()
    assert np.array_equal(found, scaled_by_hand(Image.fromarray(noise)))


def test_any_mode_and_orientation(tmp_path):
    images = MMInterleavedImageProcessor()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 300, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = images(picture.transpose(Image.Transpose.ROTATE_270)).pixel_values
    assert torch.equal(images(tmp_path / "turned.png").pixel_values, turned)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        other = picture.convert(mode)
        assert torch.equal(images(other).pixel_values, images(other.convert("RGB")).pixel_values), mode
    deep = (np.arange(240 * 300, dtype=np.uint16) % 65521).reshape(240, 300)
    assert torch.equal(images(Image.fromarray(deep)).pixel_values, images((deep >> 8).astype(np.uint8)).pixel_values)


def test_drawn_pixels_become_8_bits():
    steps = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5 / 255, 1.4999 / 255, 254.5 / 255, 1.0, 7.0])
    drawn = drawn_pictures(steps.view(1, 1, 2, 4).expand(1, 3, 2, 4))
    assert np.asarray(drawn[0])[..., 0].reshape(-1).tolist() == [0, 0, 0, 1, 1, 255, 255, 255]
    with pytest.raises(PictureError, match="not finite"):
        drawn_pictures(torch.full((1, 3, 4, 4), float("nan")))


# ---- Texts


def old_tokenizer(processor, text):
    """The ids of the old slow Llama tokenizer, step by step: split, strip, and tokenize every piece by itself."""
    special = {"<s>": 1, "</s>": 2, "<unk>": 0, "<image>": None}
    pieces, rest = [""], text
    while rest:
        for token in special:
            if rest.startswith(token):
                pieces += [token, ""]
                rest = rest[len(token) :]
                break
        else:
            pieces[-1] += rest[0]
            rest = rest[1:]
    soi, image = processor.tokenizer.convert_tokens_to_ids(["<|beginofimage|>", "<|image|>"])
    ids = [1]
    for i, piece in enumerate(pieces):
        if piece == "<image>":
            ids += [soi] + [image] * processor.num_img_token
        elif piece in special:
            ids.append(special[piece])
        else:
            piece = piece.lstrip() if i and pieces[i - 1] == "<image>" else piece
            piece = piece.rstrip() if pieces[i + 1 : i + 2] == ["<image>"] else piece
            ids += processor.tokenizer.sp_model.encode(piece) if piece else []
    return ids


def test_random_texts_are_tokenized_as_by_the_slow_tokenizer(processor):
    rng = random.Random(5)
    words = [
        "<image>",
        "<s>",
        "</s>",
        "<unk>",
        " ",
        "  ",
        "\n",
        "\t",
        "a",
        "photo of",
        "▁",
        "é猫\U0001f600",
        "<",
        "s>",
        "|>",
    ]
    words.append(processor.tokenizer.convert_ids_to_tokens(processor.pad_token_id))
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randint(1, 9)))
        if text.strip():
            assert processor.encode(text) == old_tokenizer(processor, text), text


def test_forms_of_the_call(processor):
    grey = Image.new("RGB", (10, 10), "gray")
    alone = processor(text="<image>What?", images=grey)
    assert isinstance(alone["input_ids"], list) and alone["num_image_per_seq"] == [1]
    assert "pixel_values" not in processor(text="What?", return_tensors="pt")
    both = processor(text=["a<image>b<image>", "c"], images=[grey, grey], return_tensors="np")
    assert both["pixel_values"].shape == (2, 3, 224, 224) and both["num_image_per_seq"].tolist() == [2, 0]
    assert both["attention_mask"][1].tolist() == [0] * (both["input_ids"].shape[1] - 2) + [1] * 2
    right = processor(text=["a<image>b<image>", "c"], images=[[grey, grey], []], padding_side="right")
    assert right["input_ids"][1][2:] == [processor.pad_token_id] * (len(right["input_ids"][0]) - 2)
    bare = processor(text="a", add_special_tokens=False)["input_ids"]
    assert bare == [processor.encode("a")[1:]]


def test_chat_template(processor):
    grey = Image.new("RGB", (10, 10), "gray")
    content = [{"type": "image", "image": grey}, {"type": "text", "text": "Generate the caption with grounding."}]
    messages = [{"role": "user", "content": content}]
    prompt = "You are a helpful assistant. USER: <image>Generate the caption with grounding. ASSISTANT:"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    found = processor.apply_chat_template(messages, **options)
    expected = processor(text=prompt, images=[grey], return_tensors="pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_processor_is_saved_and_loaded(case, tmp_path):
    name, processor, _, _ = case
    processor.save_pretrained(tmp_path)
    again = MMInterleavedProcessor.from_pretrained(tmp_path)
    assert (again.num_img_token, again.pad_token_id) == (processor.num_img_token, processor.pad_token_id)
    for text in ("one <s> two <image> three</s>", "<image>a\n<unk> b"):
        assert again.encode(text) == processor.encode(text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, MMInterleavedTokenizer)
    assert tokenizer("a <s> b").input_ids == processor.encode("a <s> b")
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_img_token"] == processor.num_img_token


# ---- What is refused


@pytest.mark.parametrize(
    "text, pictures, message",
    [
        (None, 1, "expected text="),
        ([], 0, "expected at least one prompt, got none"),
        ("", 0, "prompt 1 of 1 is empty"),
        (["a", "  "], 0, "prompt 2 of 2 is empty"),
        ([None], 0, "prompt 1 of 1: expected a text, got None"),
        (5, 0, "text: expected a prompt or a list of prompts, got 5"),
        ("<image>a", 0, r"has 1 <image> tag\(s\), but 0 picture\(s\) came"),
        ("a", 2, r"has 0 <image> tag\(s\), but 2 picture\(s\) came"),
        ("a <|image|> b", 0, r"spells out the special token <\|image\|>: write <image>"),
        ("<image><|beginofimage|>", 1, r"spells out the special token <\|beginofimage\|>"),
        ("\udcff", 0, "cannot be encoded as UTF-8"),
        ("<image>" * 50, 50, "has 50 pictures, of which 50 or more are visible at once.*for 49"),
    ],
)
def test_prompts_that_are_refused(processor, text, pictures, message):
    with pytest.raises(PromptError, match=message):
        processor(text=text, images=[PLACEHOLDER] * pictures or None)


def test_a_second_document_makes_room_for_more_pictures(processor):
    text = "<image>" * 49 + "</s><s>" + "<image>" * 49
    assert processor(text=text, images=[PLACEHOLDER] * 98)["num_image_per_seq"] == [98]


def test_pictures_that_are_refused(processor, tmp_path):
    (tmp_path / "broken.png").write_bytes((folder_of("mmi-tiny") / "image0.png").read_bytes()[:200])
    refused = [
        (tmp_path / "broken.png", "broken or truncated"),
        (tmp_path / "absent.png", "no such file"),
        (Image.new("RGB", (2, 401)), "too thin, expected at most 200 times"),
        (Image.new("F", (9, 9)), "32-bit F pixels have no known range"),
        (3, "got int"),
    ]
    for picture, message in refused:
        with pytest.raises(PictureError, match=f"picture 2 of 2: .*{message}"):
            processor(text="<image><image>", images=[PLACEHOLDER, picture])
    with pytest.raises(PictureError, match="got NoneType"):
        processor(text="<image>", images=[None])


def test_checkpoints_that_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no config.yaml, no config.json and no processor_config.json"):
        MMInterleavedProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text((folder_of("mmi-tiny") / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="pass llm= a folder or hub id"):
        MMInterleavedProcessor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"soi_token_id 384, but <\|beginofimage\|> has the id 448"):
        MMInterleavedProcessor.from_pretrained(tmp_path, llm=folder_of("mmi-wide") / "vicuna-tiny")
    llm = tmp_path / "llm"
    shutil.copytree(folder_of("mmi-tiny") / "vicuna-tiny", llm)
    assert MMInterleavedProcessor.from_pretrained(tmp_path, llm=llm).num_img_token == 8
    (llm / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as a sentencepiece model"):
        MMInterleavedProcessor.from_pretrained(tmp_path, llm=llm)
    (llm / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="expected tokenizer.model"):
        MMInterleavedProcessor.from_pretrained(tmp_path, llm=llm)
    with pytest.raises(TypeError, match="unknown arguments \\['lllm'\\]"):
        MMInterleavedProcessor.from_pretrained(tmp_path, lllm=llm)
