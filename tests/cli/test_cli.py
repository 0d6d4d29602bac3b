"""The command line: answers, exit codes, one-line errors, the conversation in the terminal, and the doctor."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

import mg_fast
from mg_fast import CheckpointError, cli
from mg_fast.cli import chat as chat_command
from mg_fast.cli import doctor
from mg_fast.cli.chat import CHAT_HELP
from mg_fast.ops import backend
from tests.forked_python import python
from tests.paths import ROOT

STAGES = ["preprocess", "LR tower", "HR tower", "patch info mining", "projector", "prefill to first token", "decode"]
KEYS = {
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "image_tokens",
    "cached_tokens",
    "new_tokens",
    "weight_bytes",
}
KEYS |= {"load_s", "answer_s"}


@pytest.fixture
def run(standard, capsys):
    """Runs `mg-fast run` on the tiny checkpoint and returns (exit code, stdout, stderr)."""

    def run(*arguments, model=standard):
        code = cli.main(["run", "--model", str(model), "--device", "cpu", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


# ---- run


def test_text_is_the_pipelines(run, pipeline, photo):
    for prompt in ("What is written in the picture?", "Say what <image> shows."):
        code, out, err = run("--image", photo, "--prompt", prompt, "--max-new-tokens", 8)
        assert (code, out) == (0, pipeline.chat(prompt, [photo], max_new_tokens=8).text + "\n")
        pipeline.reset()
    assert [line for line in err.splitlines() if line.startswith("loaded ")][0].endswith("(template vicuna_v1)")


def test_text_only(run, pipeline):
    code, out, _ = run("--prompt", "Hello.", "--max-new-tokens", 5)
    assert (code, out) == (0, pipeline.chat("Hello.", max_new_tokens=5).text + "\n")


def test_json(run, pipeline, photo, drawing):
    code, out, _ = run("--image", photo, "--image", drawing, "--prompt", "Compare.", "--max-new-tokens", 8, "--json")
    answer = pipeline.chat("Compare.", [photo, drawing], max_new_tokens=8)
    document = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and document.keys() == KEYS
    assert document["text"] == answer.text
    assert document["token_ids"] == answer.token_ids and document["new_tokens"] == len(answer.token_ids) == 8
    assert document["finish_reason"] == answer.finish_reason == "length"
    assert document["prompt_tokens"] == answer.prompt_tokens and document["image_tokens"] == 2 * 25
    assert document["load_s"] > 0 and document["answer_s"] > 0
    pipeline.reset()
    # Otherwise the order of the pictures would not have been tested.
    assert pipeline.chat("Compare.", [drawing, photo], max_new_tokens=8).token_ids != answer.token_ids


def test_hd(run, hd, photo):
    code, out, _ = run("--image", photo, "--prompt", "What?", "--max-new-tokens", 2, "--json", model=hd)
    assert code == 0 and json.loads(out)["image_tokens"] == 125


def test_template_is_used(run, pipeline, photo, standard):
    _, out, _ = run("--image", photo, "--prompt", "What?", "--max-new-tokens", 1, "--json", "--template", "gemma")
    processor = mg_fast.MiniGeminiProcessor.from_pretrained(standard, template="gemma")
    prompt = "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\n"
    assert json.loads(out)["prompt_tokens"] == len(processor.encode(prompt)[0])


def test_sampling_repeats_with_a_seed(run, pipeline):
    options = ("--prompt", "Tell me a story.", "--max-new-tokens", 12, "--temperature", 1.5, "--json")
    first, again, other = (json.loads(run(*options, "--seed", seed)[1])["token_ids"] for seed in (5, 5, 6))
    assert first == again != other
    assert first == pipeline.chat("Tell me a story.", max_new_tokens=12, temperature=1.5, seed=5).token_ids


def test_profile(run, pipeline, photo):
    arguments = ("--image", photo, "--prompt", "What?", "--max-new-tokens", 4, "--profile")
    code, out, err = run(*arguments)
    assert (code, out) == (0, pipeline.chat("What?", [photo], max_new_tokens=4).text + "\n")
    table = err.splitlines()[-len(STAGES) - 2 :]
    assert table[0].split()[:2] == ["stage", "time"]
    for line, stage in zip(table[2:], STAGES, strict=True):
        assert line.startswith(stage) and " ms" in line
    document = json.loads(run(*arguments, "--json")[1])
    assert document.keys() == KEYS | {"stages", "first_use_s"}
    assert [stage["name"] for stage in document["stages"]] == STAGES
    assert all(stage.keys() == {"name", "seconds", "peak_mib"} and stage["seconds"] > 0 for stage in document["stages"])


def test_first_use_is_shown(run, photo, standard, capsys):
    question = ("--image", photo, "--prompt", "What is it?", "--max-new-tokens", 4, "--profile")
    code, out, err = run(*question)
    assert code == 0 and re.search(r"^at first use: towers packed: \d+\.\d\d s$", err, re.M)
    code, out, err = run(*question, "--json")
    assert json.loads(out)["first_use_s"]["towers packed"] > 0
    assert cli.main(["warmup", "--model", str(standard)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"loaded {standard} on ") and shown[-1].startswith("at first use: all: ")


def test_long_prompts_on_demand(run):
    prompt = "a b c d e " * 450
    code, out, err = run("--prompt", prompt, "--max-new-tokens", 1)
    assert (code, out) == (5, "") and "the model was trained on at most 2048" in err and "--allow-long" in err
    code, out, _ = run("--prompt", prompt, "--max-new-tokens", 1, "--allow-long", "--json")
    assert code == 0 and json.loads(out)["prompt_tokens"] > 2048


# ---- errors

TEXT_FILE, THIN_PICTURE, EMPTY_FOLDER = "TEXT_FILE", "THIN_PICTURE", "EMPTY_FOLDER"
ERRORS = {
    "no such model": (
        3,
        ["--model", "/nonexistent/model", "--prompt", "What?"],
        "/nonexistent/model is not a folder: expected a checkpoint",
    ),
    "folder without config": (
        3,
        ["--model", EMPTY_FOLDER, "--prompt", "What?"],
        "has no config.json: expected a Mini-Gemini checkpoint",
    ),
    "no such picture": (4, ["--image", "/nonexistent.png", "--prompt", "What?"], "/nonexistent.png: no such file"),
    "folder for a picture": (4, ["--image", EMPTY_FOLDER, "--prompt", "What?"], ": a folder, expected a picture file"),
    "no picture": (4, ["--image", TEXT_FILE, "--prompt", "What?"], ": not a picture that Pillow can read"),
    "thin picture": (4, ["--image", THIN_PICTURE, "--prompt", "What?"], "1x999 pixels: too thin"),
    "tags without pictures": (5, ["--prompt", "<image> What?"], "the text has 1 <image> tag(s), but 0 picture(s) came"),
    "empty prompt": (5, ["--prompt", " "], "--prompt is empty"),
    "unknown template": (
        5,
        ["--prompt", "What?", "--template", "nosuch"],
        "unknown template 'nosuch': expected one of vicuna_v1, gemma",
    ),
    "too long": (5, ["--prompt", "x " * 3000], "tokens, the model has 4096 positions"),
}


@pytest.fixture
def named(tmp_path):
    (tmp_path / "text.png").write_text("This is no picture.")
    Image.new("RGB", (1, 999)).save(tmp_path / "thin.png")
    (tmp_path / "empty").mkdir()
    return {TEXT_FILE: tmp_path / "text.png", THIN_PICTURE: tmp_path / "thin.png", EMPTY_FOLDER: tmp_path / "empty"}


def only_error(err):
    """The line of the error, which must be the only one beside those about loading."""
    [line] = [line for line in err.splitlines() if not line.startswith(("loaded ", "weights: ", "mg-fast: WARNING: "))]
    assert line.startswith("mg-fast: error: ")
    return line.removeprefix("mg-fast: error: ")


@pytest.mark.parametrize("name", ERRORS)
def test_errors(run, named, name):
    expected, arguments, message = ERRORS[name]
    code, out, err = run(*(named.get(argument, argument) for argument in arguments))
    assert (code, out) == (expected, "")
    assert message in only_error(err)


def test_errors_are_no_json(run, named):
    for name in ("no picture", "tags without pictures", "unknown template"):
        expected, arguments, message = ERRORS[name]
        code, out, err = run(*(named.get(argument, argument) for argument in arguments), "--json")
        assert (code, out) == (expected, "") and message in only_error(err)


def test_a_backend_that_cannot_run(run, photo, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = run("--image", photo, "--prompt", "What?", "--backend", "triton")
    assert (code, out) == (6, "")
    assert only_error(err).startswith("backend 'triton' cannot run ")


def test_backend_of_the_environment_is_checked(run, photo, monkeypatch):
    monkeypatch.setenv("MG_FAST_BACKEND", "nosuch")
    code, out, err = run("--image", photo, "--prompt", "What?")
    assert (code, out) == (6, "") and only_error(err).startswith("unknown backend 'nosuch': expected one of auto")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required"),
        (["nosuch"], "invalid choice: 'nosuch'"),
        (["run", "--model", "x"], "the following arguments are required: --prompt"),
        (["run", "--prompt", "x"], "the following arguments are required: --model"),
        (
            ["run", "--model", "x", "--prompt", "x", "--backend", "nosuch"],
            "argument --backend: invalid choice: 'nosuch'",
        ),
        (
            ["run", "--model", "x", "--prompt", "x", "--max-new-tokens", "many"],
            "--max-new-tokens: expected a whole number of 1 or more, got 'many'",
        ),
        (
            ["run", "--model", "x", "--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens: expected a whole number of 1 or more, got '0'",
        ),
        (
            ["run", "--model", "x", "--prompt", "x", "--temperature", "-1"],
            "--temperature: expected a number of 0 or more, got '-1'",
        ),
        (
            ["run", "--model", "x", "--prompt", "x", "--temperature", "nan"],
            "--temperature: expected a number of 0 or more, got 'nan'",
        ),
        (["doctor", "--model", "x"], "unrecognized arguments: --model x"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and message in err and "Traceback" not in err


def test_interruption_and_unexpected_errors(monkeypatch, capsys):
    def fail(error):
        def command(args):
            raise error

        monkeypatch.setattr("mg_fast.cli.doctor.command", command)
        return cli.main(["doctor"]), *capsys.readouterr()

    assert fail(KeyboardInterrupt()) == (130, "", "mg-fast: interrupted\n")
    assert fail(RuntimeError("first line\n  second line")) == (
        1,
        "",
        "mg-fast: error: RuntimeError: first line second line\n",
    )
    assert fail(AssertionError()) == (1, "", "mg-fast: error: AssertionError: AssertionError\n")
    assert fail(CheckpointError("first line\nsecond line")) == (3, "", "mg-fast: error: first line second line\n")


def test_debug_lets_the_error_through(run):
    with pytest.raises(CheckpointError, match="/nonexistent/model is not a folder"):
        run("--prompt", "What?", "--debug", model="/nonexistent/model")


# ---- as a process


@pytest.mark.slow
def test_json_is_all_that_comes_out(standard, photo, pipeline):
    """A whole process writes nothing else to stdout: warnings, progress bars and prints of libraries go elsewhere."""
    arguments = ("--image", photo, "--prompt", "What?", "--max-new-tokens", 4, "--json")
    done = python("-m", "mg_fast", "run", "--model", standard, "--device", "cpu", *arguments)
    assert done.returncode == 0
    assert json.loads(done.stdout)["token_ids"] == pipeline.chat("What?", [photo], max_new_tokens=4).token_ids
    assert "nothing in this checkpoint tells its prompt template: using vicuna_v1" in done.stderr


@pytest.mark.slow
def test_one_line_or_a_traceback(standard):
    wrong = ("-m", "mg_fast", "run", "--model", standard, "--prompt", "What?", "--template", "nosuch")
    done = python(*wrong)
    assert (done.returncode, done.stdout) == (5, "")
    assert only_error(done.stderr).startswith("unknown template 'nosuch'") and done.stderr.count("\n") == 1
    done = python(*wrong, "--debug")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Traceback") and "PromptError: unknown template 'nosuch'" in done.stderr


HELP = """
import sys
from mg_fast.cli import main
for arguments in (["--help"], ["run", "--help"], ["chat", "--help"], ["doctor", "--help"], ["--version"], ["run"]):
    try:
        main(arguments)
    except SystemExit as exit:
        assert exit.code == (2 if arguments == ["run"] else 0), arguments
assert main(["run", "--model", "x", "--image", "/nonexistent.png", "--prompt", "x"]) == 4
assert main(["run", "--model", "x", "--prompt", ""]) == 5
heavy = {"torch", "transformers", "numpy", "PIL", "triton"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_help_and_wrong_usage_need_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "run",
        "chat",
        "doctor",
        "--image FILE",
        "--prompt TEXT",
        "--json",
        "/image FILE",
        f"mg-fast {mg_fast.__version__}",
    ):
        assert word in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", [True, False])
def test_a_reader_that_goes_away(unbuffered):
    """A closed reader, as with `| true`, causes no traceback, not even from Python's own flush at the end."""
    read, write = os.pipe()
    os.close(read)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "-m", "mg_fast", "doctor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    # Other libraries may warn: torch 2.14 does, of an enumeration of torchao's.
    assert done.returncode == 1 and not re.search("Traceback|Error|Exception", done.stderr), done.stderr


# ---- chat


@pytest.fixture
def chat(standard, capsys, monkeypatch):
    """Runs `mg-fast chat` with typed lines; returns what was printed after each line and after the end of input."""

    def chat(*lines, code=0, stdin=io.StringIO):
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        arguments = ["chat", "--model", str(standard), "--device", "cpu", "--max-new-tokens", "5"]
        assert cli.main(arguments) == code
        before, *printed = capsys.readouterr().out.split("you> ")
        assert before == ("" if stdin is io.StringIO else CHAT_HELP + "\n")
        return printed

    return chat


def answered(pipeline, *question):
    return f"model> {pipeline.chat(*question, max_new_tokens=5).text}\n"


def test_chat(chat, pipeline, photo, drawing):
    """A picture stays for the turns that follow, and /reset forgets it."""
    expected = [
        "(1 picture with the next question)\n",
        answered(pipeline, "What is it?", [photo]),
        answered(pipeline, "Are you sure?"),
        "(1 picture with the next question)\n",
        answered(pipeline, "And this?", [drawing]),
        "(conversation forgotten)\n",
    ]
    pipeline.reset()
    expected += [answered(pipeline, "Are you sure?"), "\n"]
    # Otherwise a reset that forgets nothing would pass.
    assert expected[2] != expected[6]
    lines = [
        f"/image {photo}",
        "What is it?",
        "Are you sure?",
        f"/image  {drawing} ",
        "And this?",
        "/reset",
        "Are you sure?",
    ]
    assert chat(*lines) == expected


def test_chat_with_several_pictures(chat, pipeline, photo, drawing):
    printed = chat(f"/image {photo}", f"/image {drawing}", "Compare.", f"/image {photo}", "/reset", "Hello.")
    assert printed[:2] == ["(1 picture with the next question)\n", "(2 pictures with the next question)\n"]
    assert printed[2] == answered(pipeline, "Compare.", [photo, drawing])
    pipeline.reset()
    assert printed[5] == answered(pipeline, "Hello.")


def test_chat_commands(chat):
    for words in (CHAT_HELP.split("\n")[0], "/image", "/reset", "/help", "/quit"):
        assert words in CHAT_HELP
    assert chat("/help", "", "/nosuch thing", "/quit", "never read") == [
        CHAT_HELP + "\n",
        "",
        f"unknown command /nosuch\n{CHAT_HELP}\n",
        "",
    ]
    assert chat("/exit") == [""]
    assert chat() == ["\n"]


def test_chat_shows_its_commands_to_a_person(chat):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert chat("/quit", stdin=Terminal) == [""]


def test_chat_goes_on_after_errors(chat, pipeline, photo, named):
    """An error is told in one line, and the turn and the pictures that caused it leave nothing behind."""
    printed = chat(
        "/image /nonexistent.png",
        "/image",
        f"/image {named[EMPTY_FOLDER]}",
        f"/image {named[TEXT_FILE]}",
        f"/image {named[THIN_PICTURE]}",
        "What about <image>?",
        "x " * 3000,
        f"/image {photo}",
        "What is it?",
    )
    assert printed[:7] == [
        "/nonexistent.png: no such file\n",
        "/image needs a file: /image FILE\n",
        f"{named[EMPTY_FOLDER]}: a folder, expected a picture file\n",
        f"{named[TEXT_FILE]}: not a picture that Pillow can read\n",
        f"{named[THIN_PICTURE]}: 1x999 pixels: too thin, squared and resized to 160x160 its short side is "
        "under one pixel\n",
        "model> the text has 1 <image> tag(s), but 0 picture(s) came\n",
        printed[6],
    ]
    assert "tokens, the model has 4096 positions" in printed[6] and printed[6].count("\n") == 1
    assert printed[7:] == ["(1 picture with the next question)\n", answered(pipeline, "What is it?", [photo]), "\n"]


def test_chat_survives_an_interrupted_answer(chat, pipeline, photo, monkeypatch):
    """Ctrl-C stops the answer. The turn is as if it had never been asked, and its picture is still waiting."""
    original, calls = chat_command.print_stream, []

    def interrupted_once(pieces):
        calls.append(pieces)
        if len(calls) == 1:
            next(pieces)
            raise KeyboardInterrupt
        original(pieces)

    monkeypatch.setattr(chat_command, "print_stream", interrupted_once)
    printed = chat(f"/image {photo}", "What?", "What is it?")
    assert printed[1] == "model> \n(interrupted; this turn is not kept)\n"
    assert printed[2] == answered(pipeline, "What is it?", [photo])


def test_chat_ends_with_errors_that_do_not_go_away(capsys, standard, photo, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {photo}\nWhat?\nWhat?\n"))
    assert cli.main(["chat", "--model", str(standard), "--device", "cpu", "--backend", "triton"]) == 6
    assert only_error(capsys.readouterr().err).startswith("backend 'triton' cannot run ")
    assert cli.main(["chat", "--model", "/nonexistent/model"]) == 3


# ---- doctor


def test_doctor(capsys, monkeypatch):
    version = importlib.metadata.version

    def without_timm(name):
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_timm)
    assert cli.main(["doctor"]) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert err == "" and lines[0].startswith(
        f"mg_fast {mg_fast.__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"
    )
    for name in ("torch", "torchvision", "transformers", "accelerate"):
        assert f"{name} {version(name)} ({doctor.beside_tested(name, version(name))})" in lines
    for name in ("open_clip_torch", "safetensors"):
        assert f"{name} {version(name)}" in lines
    assert f"sentencepiece {version('sentencepiece')} (tokenizers)" in lines
    assert "timm not installed (high-resolution tower)" in lines
    assert any(line.startswith(("GPU 0: ", "GPU: none that torch can use")) for line in lines)


@pytest.mark.parametrize(
    "version, told",
    [
        ("2.11.0+cu130", "tested: 2.11.0 to 2.14.1"),
        ("2.14.1", "tested: 2.11.0 to 2.14.1"),
        ("2.15.0", "tested: 2.11.0 to 2.14.1, this is newer"),
        ("2.9.1", "tested: 2.11.0 to 2.14.1, this is older"),
    ],
)
def test_doctor_says_what_was_tested(monkeypatch, version, told):
    monkeypatch.setitem(doctor.TESTED, "torch", ("2.11.0", "2.14.1"))
    assert doctor.beside_tested("torch", version) == told
    assert doctor.beside_tested("pillow", version) is None


def test_doctor_lists_backends_and_reasons(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # What `auto` takes does not depend on the backend that the environment asks for.
    monkeypatch.setenv("MG_FAST_BACKEND", "reference")
    assert cli.main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    refused = 0
    for operation in backend.OPERATIONS:
        at = lines.index(f"{operation} on cpu: auto runs {backend.choose(operation, 'auto', 'cpu')}")
        expected = []
        for name in ("reference", "torch", "triton"):
            reason = backend.why_not(operation, name, "cpu")
            refused += reason is not None
            expected.append(f"{name} can run" if reason is None else f"{name} cannot: {reason}")
        assert lines[at + 1 : at + 4] == expected
        assert expected[0] == "reference can run"
    assert refused >= len(backend.OPERATIONS)
