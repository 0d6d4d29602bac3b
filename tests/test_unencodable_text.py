"""Text that UTF-8 cannot encode is refused, with the place of the fault, on every path, and other work goes on."""

import io
import json
import subprocess
import sys

import pytest
import torch

import mg_fast
from mg_fast import PromptError, cli
from mg_fast.engine.conversation import Conversation
from mg_fast.models.templates import render
from tests.paths import ROOT

# Half of a surrogate pair (as in a cut JSON escape), a whole pair as two halves, and a byte that Python kept as it was.
TEXTS = {
    "half": ("bad \ud83d one", r"character 5 of 9, \\ud83d, is half of a surrogate pair"),
    "pair": (json.loads('"\\ud83d"') + "\ude00", r"character 1 of 2, \\ud83d, is half of a surrogate pair"),
    "byte": (
        b"caf\xe9".decode("utf-8", "surrogateescape"),
        r"character 4 of 4, \\udce9, stands for a byte that is not UTF-8",
    ),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_way_in(pipeline, photo, kind):
    text, message = TEXTS[kind]
    processor, template = pipeline.processor, pipeline.template
    ways = {
        "chat": lambda: pipeline.chat(text),
        "chat with a picture": lambda: pipeline.chat(text, [photo]),
        "stream": lambda: next(iter(pipeline.chat(text, stream=True))),
        "conversation": lambda: pipeline.conversation().chat(text),
        "explain": lambda: pipeline.explain(photo, text),
        "stop strings": lambda: pipeline.chat("Hello.", stop_strings=["a", text]),
        "stop string": lambda: pipeline.chat("Hello.", stop_strings=text),
        "processor": lambda: processor(text=["fine", text]),
        "encode": lambda: processor.encode(text),
        "render": lambda: render(template, [("fine", "fine"), (text, None)]),
        "render an answer": lambda: render(template, [("fine", text), ("fine", None)]),
        "render a system text": lambda: render(template, [("fine", None)], system=text),
    }
    for tokenize in (False, True):
        for content in (text, [{"type": "text", "text": text}]):
            messages = [{"role": "user", "content": content}]
            ways[f"message {tokenize} {type(content)}"] = lambda m=messages, t=tokenize: processor.apply_chat_template(
                m, tokenize=t
            )
            ways[f"messages {tokenize} {type(content)}"] = lambda m=messages, t=tokenize: processor.apply_chat_template(
                [m], tokenize=t
            )
    for name, way in ways.items():
        with pytest.raises(PromptError, match=message):
            way()
            raise AssertionError(name)
    assert pipeline._own.turns == []


def test_the_remedy_works(pipeline):
    """What the error message advises turns the text into text that the model accepts."""
    mended = "\ud83d\ude00 and \ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended == "\U0001f600 and �"
    assert pipeline.chat(mended, max_new_tokens=2).token_ids


@pytest.mark.parametrize("kind", TEXTS)
def test_in_its_place_in_a_batch(pipeline, photo, kind):
    text, message = TEXTS[kind]
    answers = pipeline.chat_batch(["fine", text, ("so is this", [photo])], max_new_tokens=2, progress=False)
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, False]
    with pytest.raises(PromptError, match=message):
        raise answers[1].error


class Odd(dict):
    def __contains__(self, key):
        raise KeyError("a caller's own class")


class Picture:
    def read(self, size=-1):
        raise RuntimeError("a library's own error")

    seek = tell = read


def test_no_item_ends_a_batch(pipeline, monkeypatch):
    """Other questions are answered even if a caller's class, a tokenizer or a library for pictures raises any error."""
    encode = type(pipeline.processor).encode

    def fussy(self, prompt, **options):
        if "spoil" in prompt:
            raise OverflowError("a tokenizer's own error")
        return encode(self, prompt, **options)

    see = type(pipeline.vision).see

    def broken(self, image, **options):
        if image == "broken":
            raise ZeroDivisionError("an error of a decoder")
        return see(self, image, **options)

    monkeypatch.setattr(type(pipeline.processor), "encode", fussy)
    monkeypatch.setattr(type(pipeline.vision), "see", broken)
    bad = [Odd(text="a"), "spoil it", ("a", ["broken"]), ("a", [Picture()])]
    answers = pipeline.chat_batch([*bad, "fine"], max_new_tokens=2, progress=False)
    assert [type(answer.error) for answer in answers] == [
        KeyError,
        OverflowError,
        ZeroDivisionError,
        mg_fast.PictureError,
        type(None),
    ]
    assert len(answers[-1].token_ids) == 2


def test_interruptions_still_end_a_batch(pipeline, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipeline.vision), "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.chat_batch([("a", ["b"])], progress=False)


# ---- The command line


@pytest.mark.parametrize("command", (["run"], ["explain", "--image", "PHOTO", "--out", "out.png"]))
def test_prompts_of_the_command_line(command, standard, photo, monkeypatch, capsys):
    """Python passes arguments that are not UTF-8 as surrogates. They are refused before the model is loaded."""
    monkeypatch.setattr("mg_fast.cli.loading.load", None)
    command = [str(photo) if word == "PHOTO" else word for word in command]
    assert cli.main([*command, "--model", str(standard), "--prompt", TEXTS["byte"][0]]) == 5
    assert "--prompt cannot be encoded as UTF-8: character 4 of 4" in capsys.readouterr().err


def talk(standard, typed, **environment):
    """The output of `mg-fast chat` for these typed bytes, by lines of input."""
    command = [
        sys.executable,
        "-m",
        "mg_fast",
        "chat",
        "--model",
        str(standard),
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
    ]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8", "replace").split("you> ")[1:]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ({}, {"PYTHONIOENCODING": "utf-8"}, {"PYTHONIOENCODING": "ascii"}))
def test_a_conversation_outlives_bad_bytes(standard, environment):
    typed = "Hello.\n\udce5\udca5 hi\nHello again.\n/image caf\udce9.png\n/caf\udce9\n/reset\nHello.\nHello again.\n"
    printed = talk(standard, typed.encode("utf-8", "surrogateescape"), **environment)
    assert (
        printed[1].startswith("model> the text cannot be encoded as UTF-8: character 1 of 5")
        and printed[1].count("\n") == 1
    )
    assert "no such file" in printed[3] and "unknown command /caf" in printed[4]
    # The second question is asked in the conversation of the first, as it is after the reset.
    assert printed[:3:2] == printed[6:8]


def test_a_conversation_outlives_what_one_question_spoils(standard, monkeypatch, capsys):
    answers = iter([FloatingPointError("not finite"), torch.OutOfMemoryError("too long"), PromptError("too long too")])

    def chat(self, *arguments, **options):
        if (error := next(answers, None)) is not None:
            raise error
        return iter(["fine"])

    monkeypatch.setattr(Conversation, "chat", chat)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\nd\n"))
    assert cli.main(["chat", "--model", str(standard), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.split("you> ")[1:]
    assert printed == ["model> not finite\n", "model> too long\n", "model> too long too\n", "model> fine\n", "\n"]
