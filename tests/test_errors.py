"""Messages stay short and printable for any input: no error of the package is longer than 500 characters."""

import copy
import io
import json
import logging
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast import CheckpointError, MgFastError, PictureError, PromptError, cli, ops
from mg_fast.errors import LONGEST_MESSAGE, quoted, shortened
from mg_fast.models.pictures import check_decoder, open_picture
from mg_fast.models.templates import render
from tests.paths import ROOT

LONG = "x" * 100_000
WORDS = "word " * 20_000
SURROGATES = "\ud83d" * 100_000


def test_shortened_keeps_the_beginning_and_the_end():
    assert shortened("short") == "short"
    assert shortened("y" * 500) == "y" * 500
    text = "the beginning" + LONG + "the end"
    cut = shortened(text)
    assert len(cut) <= LONGEST_MESSAGE and cut.startswith("the beginning") and cut.endswith("the end")
    head, note = cut.split(" [... ")
    number, tail = note.split(" characters left out ...] ")
    assert len(head) + int(number) + len(tail) == len(text)
    for length in range(0, 3000, 7):
        for letter in ("a", "\ud83d", "é"):
            cut = shortened(letter * length)
            assert len(cut) <= LONGEST_MESSAGE
            cut.encode()


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


def test_quoted_is_short_for_anything():
    for value in (
        LONG,
        [LONG] * 1000,
        {LONG: LONG},
        [[[[[[LONG] * 9] * 9] * 9] * 9] * 9] * 9,
        10**10_000,
        Unspeakable(),
        SURROGATES,
    ):
        assert len(quoted(value)) <= 160
        quoted(value).encode()
    assert quoted("text") == "'text'" and quoted(5) == "5" and quoted(["a", 1]) == "['a', 1]" and quoted(None) == "None"
    assert quoted(bytes(10**6)) == "bytes of length 1000000"
    assert "Unspeakable" in quoted(Unspeakable())


def test_errors_survive_copies_and_pickles():
    for kind in (MgFastError, CheckpointError, PictureError, PromptError, mg_fast.BackendError):
        error = kind("begin" + LONG)
        assert len(str(error)) <= LONGEST_MESSAGE and str(error).startswith("begin")
        for other in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
            assert type(other) is kind and str(other) == str(error)
        str(kind(f"a path with {SURROGATES[:1]}")).encode()
        assert kind(7).args == (7,) and kind().args == ()


def calls(pipeline, standard, tmp_path):
    """Yields (name, call) for many errors with huge input. Each call must raise."""
    processor, images = pipeline.processor, pipeline.processor.image_processor
    part = {"type": "image", "path": LONG}
    yield from {
        "render user": lambda: render("vicuna_v1", [(7 * [LONG], None)]),
        "render template": lambda: render(LONG, [("a", None)]),
        "render system": lambda: render("gemma", [("a", None)], system=LONG),
        "render surrogate": lambda: render("vicuna_v1", [(SURROGATES, None)]),
        "chat text": lambda: pipeline.chat([LONG] * 100),
        "chat surrogate": lambda: pipeline.chat(SURROGATES),
        "chat too long": lambda: pipeline.chat(WORDS),
        "chat tags": lambda: pipeline.chat("<image>" * 10_000),
        "chat temperature": lambda: pipeline.chat("a", temperature=LONG),
        "chat top_p": lambda: pipeline.chat("a", temperature=1.0, top_p=[LONG] * 5),
        "chat max_new_tokens": lambda: pipeline.chat("a", max_new_tokens=LONG),
        "chat max_new_tokens array": lambda: pipeline.chat("a", max_new_tokens=np.zeros((100, 100))),
        "chat seed": lambda: pipeline.chat("a", temperature=1.0, seed=10**400),
        "chat seed of many digits": lambda: pipeline.chat("a", temperature=1.0, seed=10**10_000),
        "chat picture path": lambda: pipeline.chat("a", [LONG]),
        "chat picture url": lambda: pipeline.chat("a", ["http://" + LONG]),
        "chat picture data": lambda: pipeline.chat("a", ["data:image/png;base64," + LONG]),
        "chat picture data fetched": lambda: pipeline.chat("a", ["data:image/png;base64," + LONG], allow_urls=True),
        "chat picture words": lambda: pipeline.chat("a", [WORDS]),
        "chat picture label": lambda: open_picture(b"nothing", label=LONG),
        "chat picture array": lambda: pipeline.chat("a", [np.zeros([1] * 60)]),
        "see surrogate": lambda: pipeline.see(SURROGATES),
        "explain": lambda: pipeline.explain(Image.new("RGB", (9, 9)), SURROGATES),
        "batch item": lambda: pipeline.chat_batch(LONG),
        "batch size": lambda: pipeline.chat_batch(["a"], batch_size=LONG),
        "batch options": lambda: pipeline.chat_batch(["a"], stop_strings=[SURROGATES]),
        "processor prompt": lambda: processor(text=[{LONG: LONG}]),
        "processor arguments": lambda: processor(text="a", **{LONG: 1}),
        "processor padding": lambda: processor(text="a", padding=LONG),
        "processor surrogate": lambda: processor(text=SURROGATES),
        "processor encode": lambda: processor.encode(SURROGATES),
        "processor picture": lambda: processor(text="<image>", images=[LONG]),
        "processor unknown": lambda: mg_fast.MiniGeminiProcessor.from_pretrained(standard, **{LONG: 1}),
        "processor template": lambda: mg_fast.MiniGeminiProcessor.from_pretrained(standard, template=LONG),
        "message picture": lambda: processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True),
        "message keys": lambda: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", LONG: 1}]}], tokenize=True
        ),
        "message surrogate": lambda: processor.apply_chat_template([{"role": LONG, "content": SURROGATES}]),
        "image processor": lambda: images([LONG, LONG]),
        "decoder": lambda: check_decoder(LONG, None),
        "nvjpeg": lambda: check_decoder("nvjpeg", None),
        "load": lambda: mg_fast.load(LONG),
        "load path": lambda: mg_fast.load("/" + LONG),
        "load hub id": lambda: mg_fast.load(f"{LONG}/{LONG}"),
        "load surrogate": lambda: mg_fast.load(SURROGATES),
        "load device": lambda: mg_fast.load(standard, device=LONG),
        "load backend": lambda: mg_fast.load(standard, backend=LONG),
        "load quantize": lambda: mg_fast.load(standard, quantize=LONG),
        "load base model": lambda: mg_fast.load(standard, base_model=LONG),
        "model subfolder": lambda: mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(standard, subfolder=LONG),
        "use_backend": lambda: mg_fast.use_backend(LONG).__enter__(),
        "accelerate": lambda: mg_fast.accelerate(LONG),
        "resize": lambda: ops.dual_resize(torch.zeros([1] * 60, dtype=torch.uint8), 8, 8),
    }.items()
    for key in (
        "model_type",
        "conversation_template",
        "mm_vision_select_feature",
        "image_grid",
        "image_size_aux",
        "mm_projector_type",
    ):
        yield f"config {key}", lambda key=key: mg_fast.load(changed(standard, tmp_path / key, {key: LONG}))
    for key in ("hidden_size", "rope_theta", "mm_hidden_size", "mm_vision_select_layer", "hidden_act"):
        yield f"config {key}", lambda key=key: mg_fast.load(changed(standard, tmp_path / key, {key: [LONG] * 100}))
    yield "config eva", lambda: mg_fast.load(changed(standard, tmp_path / "eva", {"mm_vision_tower": "eva" + LONG}))
    yield "config architectures", lambda: mg_fast.MiniGeminiConfig(architectures=[LONG] * 1000)
    yield "config layers", lambda: mg_fast.load(changed(standard, tmp_path / "layers", {"num_hidden_layers": 30}))
    yield "index", lambda: mg_fast.load(indexed(standard, tmp_path / "index", {LONG: LONG}))
    yield (
        "index of many",
        lambda: mg_fast.load(indexed(standard, tmp_path / "many", {f"{i}{LONG[:9999]}": "a" for i in range(99)})),
    )
    yield "index of nothing", lambda: mg_fast.load(indexed(standard, tmp_path / "nothing", [LONG] * 100))


def changed(standard, folder, values):
    shutil.copytree(standard, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def indexed(standard, folder, files):
    shutil.copytree(standard, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_no_message_repeats_long_input(pipeline, standard, tmp_path):
    long, seen = {}, 0
    for name, call in calls(pipeline, standard, tmp_path):
        with pytest.raises(Exception) as caught:
            call()
        seen += 1
        message = str(caught.value)
        message.encode()
        if not 5 < len(message) <= LONGEST_MESSAGE:
            long[name] = type(caught.value).__name__, len(message), message[:200]
    assert not long and seen > 60


def test_answers_of_a_batch_too(pipeline):
    items = [
        LONG + SURROGATES,
        {LONG: 1},
        ("a", [LONG]),
        ("a", ["iVBORw0KGgo" * 9999]),
        [LONG] * 1000,
        ("<image>" * 5000, []),
    ]
    for answer in pipeline.chat_batch([*items, "Hello."], max_new_tokens=2, progress=False)[:-1]:
        assert answer.finish_reason == "error" and 5 < len(str(answer.error)) <= LONGEST_MESSAGE


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--model", "nano", "--prompt", "a", "--seed", LONG],
        ["run", "--model", "nano", "--prompt", "a", "--max-new-tokens", LONG],
        ["run", "--model", "nano", "--prompt", "a", "--temperature", LONG],
        ["run", "--model", "nano", "--prompt", "a", "--backend", LONG],
        ["run", "--model", "nano", "--prompt", "a", "--image", LONG],
        ["run", "--model", "nano", "--prompt", "a", "--device", LONG],
        ["run", "--model", "nano", "--prompt", "a", "--template", LONG],
        ["run", "--model", LONG, "--prompt", "a"],
        ["run", "--model", "/" + LONG, "--prompt", "a"],
        ["run", "--model", "nano", "--prompt", SURROGATES],
        ["explain", "--model", "nano", "--image", LONG, "--out", LONG],
        ["compile", "--arch", LONG],
        ["warmup", "--model", LONG],
        [LONG],
        ["doctor", LONG],
    ],
    ids=str,
)
def test_the_command_line(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    [line] = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert code and len(line) <= LONGEST_MESSAGE + 40


def test_the_command_line_shortens_errors_of_libraries(monkeypatch, capsys):
    def fail(arguments):
        raise RuntimeError("begin" + LONG)

    monkeypatch.setattr("mg_fast.cli.doctor.command", fail)
    assert cli.main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mg-fast: error: RuntimeError: begin") and len(err) <= LONGEST_MESSAGE + 20


def test_warnings_about_pictures_are_short(caplog):
    frames = [Image.new("RGBA", (4, 4), (i, 0, 0, 0)) for i in range(2)]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    out.name = LONG
    with caplog.at_level(logging.WARNING):
        open_picture(out)
    assert len(caplog.records) == 2 and all(len(record.getMessage()) <= LONGEST_MESSAGE for record in caplog.records)


def test_the_messages_module_needs_no_library():
    """The errors module imports no library, so that the command line reports wrong usage before any large import."""
    imports = "import sys, mg_fast.errors, mg_fast.runtime.arguments, mg_fast.cli.options"
    code = f"{imports}; assert not {{'torch', 'numpy', 'PIL'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
