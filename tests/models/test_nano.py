"""Nano, the trained checkpoint in the package, from end to end: what it reads, says and refuses, asked in every way."""

import copy
import hashlib
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from safetensors import safe_open

import mg_fast
from mg_fast import CheckpointError, MiniGeminiForConditionalGeneration, cli
from mg_fast.models import builtin
from mg_fast.models.mini_gemini import launches
from recipes.nano.evaluate import accuracy_table, evaluate_varied
from recipes.nano.model import forget_mined
from recipes.nano.rounding import rounding_table
from recipes.nano.scenes import CELL, draw_number, draw_scene
from recipes.nano.talk import ask
from recipes.nano.varied_questions import VARIED_KINDS
from tests.forked_python import python
from tests.paths import ROOT

QUESTION = "What does the sign say?"
# Recorded results. The first belongs to the weights in the package, the others to trainings of other seeds.
RESULTS = sorted((ROOT / "bench" / "results").glob("nano-[0-9].json"))
# The largest number of tokens in an answer. The longest answer that nano learned has fewer.
MOST = 64
# Scenes that neither training nor the evaluation draws.
SCENES = [draw_scene(20, i, split="unseen", number=draw_number(random.Random(i), training=False)) for i in range(12)]


@pytest.fixture(scope="module")
def nano():
    return mg_fast.load("nano", device="cpu")


@pytest.fixture(autouse=True)
def forgotten(nano, one_thread):
    """Lets every test begin its own conversation."""
    nano.reset()


def asked(kind: str) -> list[tuple[str, str, Image.Image]]:
    """Questions of a type about all scenes that allow one, with their right answers and pictures."""
    turns = [(ask(scene, kind, random.Random(i)), scene.image) for i, scene in enumerate(SCENES)]
    return [(*turn, image) for turn, image in turns if turn is not None]


def said(pipeline, questions, **options) -> list[str]:
    """Answers to (text, images), each in its own conversation."""
    answers = pipeline.chat_batch(questions, max_new_tokens=MOST, progress=False, **options)
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.text for answer in answers]


def read(pipeline) -> int:
    """How many of the scenes' numbers are read exactly."""
    answers = said(pipeline, [(QUESTION, [scene.image]) for scene in SCENES])
    return sum(answer == f"The number is {scene.print.text}." for answer, scene in zip(answers, SCENES))


# ---- What it has learned


def test_small_print_is_read(nano):
    assert read(nano) >= 11


def test_without_the_mined_features_it_is_not(nano):
    model = copy.deepcopy(nano.model)
    forget_mined(model)
    assert read(mg_fast.Pipeline(model, nano.processor)) <= 1


# `most` is how many answers may be wrong. The recorded results say how well nano does.
@pytest.mark.parametrize(
    ("kind", "most"), [("colour", 0), ("background", 0), ("where", 0), ("count", 1), ("describe", 1)]
)
def test_questions_about_what_there_is(nano, kind, most):
    turns = asked(kind)
    answers = said(nano, [(question, [image]) for question, _, image in turns])
    wrong = [(question, answer, right) for (question, right, _), answer in zip(turns, answers) if answer != right]
    assert len(turns) >= 5 and len(wrong) <= most, wrong


@pytest.fixture(scope="module")
def beyond(nano):
    """The shares of right answers beyond ordinary scenes, and the wrong answers, to ten questions of each kind."""
    return evaluate_varied({"nano": nano}, seed=20, count=10)


# The recorded results say how well nano does.
@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIED_KINDS)
def test_what_ordinary_scenes_do_not_show(beyond, kind):
    shares, wrong = beyond
    missed = [row for row in wrong if row["kind"] == kind]
    recorded = json.loads(RESULTS[0].read_text())["varied"]["with mining"][kind]
    assert shares["asked"][kind] >= 7 and len(missed) <= min(2 + 20 * (1 - recorded), 8), missed


def test_later_questions_are_about_the_same_picture(nano):
    right = []
    for scene in SCENES[:6]:
        conversation = nano.conversation()
        turns = [ask(scene, kind, random.Random(0)) for kind in ("background", "number", "where")]
        for i, (question, answer) in enumerate(turns):
            given = conversation.chat(question, [scene.image] if i == 0 else None, max_new_tokens=MOST)
            assert given.image_tokens == 36 and (i == 0 or given.cached_tokens > 36)
            right.append(given.text == answer)
    assert sum(right) >= 17, right


def test_a_wish_for_a_drawing_is_answered_with_a_prompt(nano):
    answer = nano.chat("Draw this again. <GEN>", [SCENES[0].image], max_new_tokens=MOST)
    assert re.fullmatch(r"<h>[^<>]+ on a [a-z]+ background, [^<>]+</h>", answer.text), answer.text
    assert answer.finish_reason == "stop"


def test_without_a_picture(nano):
    assert nano.chat("Hello.", max_new_tokens=MOST).text == "Hello! Show me a picture."


def test_explain_shows_the_print(nano):
    """For a number, the most relevant query, and most of the colour, lie at the cell that holds the print's centre."""
    relevant = coloured = 0
    for scene in SCENES[:6]:
        explanation = nano.explain(scene.image, QUESTION, max_new_tokens=MOST)
        row, column = int(scene.print.y // CELL), int(scene.print.x // CELL)
        relevant += int(explanation.relevance.argmax()) == 6 * row + column
        pixels = torch.from_numpy(np.asarray(explanation.image).astype(np.float32))
        colour = (pixels.amax(-1) - pixels.amin(-1)).unflatten(1, (6, -1)).unflatten(0, (6, -1)).sum((1, 3))
        # Mined features may come from beyond the border of the window.
        y, x = divmod(int(colour.argmax()), 6)
        coloured += abs(row - y) <= 1 and abs(column - x) <= 1
    assert relevant >= 5 and coloured >= 5


# ---- The words are the same by every way of asking.

MIXED = [
    ("What does the sign say?", [SCENES[0].image]),
    ("Describe the picture.", [SCENES[1].image]),
    "Who are you?",
    ("How many shapes are there?", [SCENES[2].image]),
    ("Where is the number?", [SCENES[0].image]),
    ("Draw this again. <GEN>", [SCENES[3].image]),
]


@pytest.fixture(scope="module")
def alone(nano):
    """Whole answers to `MIXED`, asked one after the other."""
    given = []
    for question in MIXED:
        text, images = (question, None) if isinstance(question, str) else question
        given.append(nano.conversation().chat(text, images, max_new_tokens=MOST).text)
    # With fewer different answers, the comparisons would tell nothing.
    assert len(set(given)) >= 4
    return given


@pytest.mark.parametrize("batch_size", [2, 16])
def test_in_a_batch(nano, alone, batch_size):
    assert said(nano, MIXED, batch_size=batch_size) == alone


def test_streamed(nano, alone):
    for question, whole in zip(MIXED, alone):
        text, images = (question, None) if isinstance(question, str) else question
        pieces = list(nano.conversation().chat(text, images, max_new_tokens=MOST, stream=True))
        assert "".join(pieces) == whole and len(pieces) > 2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_by_backend(nano, alone, backend):
    pipeline = mg_fast.Pipeline(nano.model, nano.processor, backend=backend)
    assert said(pipeline, MIXED, batch_size=1) == alone


def test_by_plain_generate(nano, alone):
    """transformers' own loop over the ordinary classes, without a pipeline, gives the same words."""
    folder = builtin.resolve("nano")
    processor = mg_fast.MiniGeminiProcessor.from_pretrained(folder)
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    content = [{"type": "image", "image": SCENES[0].image}, {"type": "text", "text": MIXED[0][0]}]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with mg_fast.use_backend("reference"):
        out = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
    text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert text.strip() == alone[0]


@pytest.mark.slow
def test_by_the_command_line(nano, alone, tmp_path):
    SCENES[0].image.save(tmp_path / "scene.png")
    command = [
        "run",
        "--model",
        "nano",
        "--device",
        "cpu",
        "--image",
        str(tmp_path / "scene.png"),
        "--prompt",
        MIXED[0][0],
    ]
    command += ["--max-new-tokens", str(MOST)]
    done = python("-m", "mg_fast", *command)
    assert (done.returncode, done.stdout) == (0, alone[0] + "\n"), done.stderr
    assert re.search(r"^loaded nano on cpu in .* \(template chatml_direct\)$", done.stderr, re.M)


# ---- Pictures that it was not made for


def strange(name: str) -> Image.Image:
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return {
        "photograph": lambda: photo,
        "grayscale": lambda: photo.convert("L"),
        "RGBA": lambda: photo.convert("RGBA"),
        "palette": lambda: photo.convert("P"),
        "black square": lambda: Image.new("RGB", (500, 500)),
        "strip": lambda: Image.effect_noise((4000, 300), 80).convert("RGB"),
        "tall strip": lambda: Image.effect_noise((300, 4000), 80).convert("RGB"),
        "one pixel": lambda: Image.new("RGB", (1, 1), "red"),
    }[name]()


@pytest.mark.parametrize(
    "name", ["photograph", "grayscale", "RGBA", "palette", "black square", "strip", "tall strip", "one pixel"]
)
def test_any_picture_gets_an_answer(nano, name):
    answer = nano.chat("What is in the picture?", [strange(name)], max_new_tokens=MOST)
    assert answer.image_tokens == 36 and answer.text


# ---- Recorded results

ROUNDING = ROOT / "bench" / "results" / "nano-rounding.json"


def test_the_page_says_what_was_recorded():
    recorded = [json.loads(file.read_text()) for file in RESULTS]
    tables = [accuracy_table(*recorded, part=part) for part in ("exact", "varied") if part in recorded[0]]
    for table in (*tables, rounding_table(json.loads(ROUNDING.read_text()))):
        assert table in (ROOT / "docs" / "nano.md").read_text(encoding="utf-8"), f"docs/nano.md should hold\n{table}"


def test_rounding_was_recorded_for_these_weights():
    recorded = json.loads(ROUNDING.read_text())
    weights = hashlib.sha256((builtin.resolve("nano") / "model.safetensors").read_bytes()).hexdigest()
    for conditions, scenes in ((recorded["conditions"], 100), (recorded["triton"]["conditions"], 4)):
        assert weights.startswith(conditions["sha256 of weights"]) and conditions["scenes"] >= scenes
    # The first form is what the others are compared with, and every question was asked of all forms.
    assert set(recorded["exact"]["as float32"]) == {"float32", "float32, reference", "bfloat16", "int8", "int4", "fp8"}
    assert recorded["exact"]["as float32"]["float32"] == 1.0 and "float32, triton" in recorded["triton"]["exact"]
    exact = json.loads(RESULTS[0].read_text())
    assert recorded["conditions"]["seed"] == exact["conditions"]["seed"]
    for part in {"exact", "varied"} & {*recorded}:
        assert all(count <= exact[part]["asked"][kind] for kind, count in recorded[part]["asked"].items())
        # The same questions have the same answers. Fewer scenes can be compared in this way only where they are all.
        if recorded[part]["asked"] == exact[part]["asked"]:
            assert recorded[part]["float32"] == exact[part]["with mining"]


def test_the_record_is_of_these_weights_and_of_unseen_scenes_enough():
    recorded = [json.loads(file.read_text()) for file in RESULTS]
    weights = hashlib.sha256((builtin.resolve("nano") / "model.safetensors").read_bytes()).hexdigest()
    assert weights.startswith(recorded[0]["conditions"]["sha256 of weights"]["with mining"])
    for result in recorded:
        assert result["conditions"]["scenes"] >= 500 and result["conditions"]["split"] == "unseen"
        for name, training in result["conditions"]["training"].items():
            assert training["hr"] == (name == "with mining")


# ---- The package


def test_the_box():
    folder = builtin.resolve("nano")
    assert folder == ROOT / "mg_fast" / "nano" and builtin.names() == ["nano"]
    assert (folder / "model.safetensors").stat().st_size <= 8e6
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        # A safetensors file is not a dictionary.
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_what_load_makes_of_it(nano):
    """`load` takes template, sizes and stop ids from the checkpoint's own files."""
    images = nano.processor.image_processor
    assert (nano.template, images.lr_size, images.hr_size, images.tokens_per_picture) == ("chatml_direct", 84, 192, 36)
    # Weights are stored in half precision and run in single precision, because half is slower on a CPU.
    assert nano.model.dtype == torch.float32
    assert nano.processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in nano.model.generation_config.eos_token_id


def test_a_local_checkpoint_of_that_name_wins(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    # A folder with other content, such as recipes/nano, is not a checkpoint.
    assert builtin.resolve("nano") == ROOT / "mg_fast" / "nano"
    (tmp_path / "nano" / "config.json").write_text("{}")
    assert builtin.resolve("nano") == "nano" and builtin.resolve(Path("nano")) == Path("nano")
    with pytest.raises(CheckpointError, match="^nano/config.json .* has no image_size_aux"):
        mg_fast.load("nano")


def test_a_file_of_that_name_does_not(tmp_path, monkeypatch):
    (tmp_path / "nano").touch()
    monkeypatch.chdir(tmp_path)
    assert builtin.resolve("nano") == ROOT / "mg_fast" / "nano"


def test_unknown_names_are_told_what_there_is(capsys):
    message = "'nono' is neither a folder here nor a checkpoint of the package (nano): a hub id has the form owner/name"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        mg_fast.load("nono")
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        launches.model_config("nono")
    for command in (["run", "--prompt", "What?"], ["chat"], ["warmup"]):
        assert cli.main([*command, "--model", "nono"]) == 3
        assert capsys.readouterr().err == f"mg-fast: error: {message}\n"


@pytest.mark.parametrize("name", ["owner/nano", "./nano", "/nano", "~/nano", "..", "", Path("owner/nano")])
def test_paths_and_hub_ids_are_left_alone(name):
    assert builtin.resolve(name) == name


def test_from_pretrained_stays_ordinary():
    """`from_pretrained` takes the name as a hub id, which is unreachable offline."""
    with pytest.raises(CheckpointError, match="nano is neither a folder nor a hub id that can be loaded"):
        MiniGeminiForConditionalGeneration.from_pretrained("nano")


def test_kernels_are_compiled_for_it_too():
    assert launches.model_config("nano").tokens_per_picture == 36


# ---- The demo


def demo(*arguments, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = python("-m", "recipes.demo", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_demo(tmp_path):
    out = demo(tmp_path=tmp_path)
    saved = sorted(tmp_path.glob("mg_fast-demo-*.png"))
    seed = re.search(r"seed (\d+); ", out)[1]
    picture, drawn, heat = (tmp_path / f"mg_fast-demo-{seed}{end}.png" for end in ("", "-drawn", "-heat"))
    assert saved == sorted([picture, drawn, heat]) and all(str(file) in out for file in saved)
    assert f"picture: {picture}  (seed {seed}; " in out
    # Three questions about the scene, the wish, and three questions about what was drawn.
    assert out.count("\nyou:    ") == out.count("\nnano:   ") == 7
    assert out.count("(correct)") + out.count("(WRONG: ") == 6
    assert "patch info mining" in out and "The words are the same." in out and "drawing, step 30 of 30" in out
    before = [file.read_bytes() for file in saved]
    for file in saved:
        file.unlink()
    again = demo("--seed", seed, tmp_path=tmp_path)
    assert [file.read_bytes() for file in saved] == before
    answers = [re.findall(r"^nano:   (.*)  \[", text, re.M) for text in (out, again)]
    assert answers[0] == answers[1] and len(answers[0]) == 6


@pytest.mark.slow
def test_demo_of_ones_own_picture(tmp_path, photo):
    out = demo("--photo", str(photo), tmp_path=tmp_path)
    assert (
        f"picture: {photo}\n" in out and "(correct)" not in out and "WRONG" not in out and out.count("\nnano:   ") == 3
    )
