"""`mg_fast.load` and the commands recognise MM-Interleaved, as published and as `save_pretrained` writes it."""

import copy
import json
import pickle

import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast import CheckpointError, cli
from mg_fast.cli import chat as chat_command
from tests.models.mm_interleaved.recorded import NAMES, folder_of

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "Say what <image> shows."


@pytest.fixture(scope="module")
def published():
    return folder_of(NAMES[0])


@pytest.fixture(scope="module")
def pipeline(published):
    return mg_fast.load(published, dtype="float32", device="cpu")


@pytest.fixture
def loaded(pipeline, monkeypatch):
    """Commands get a pipeline over the loaded model."""
    made = mg_fast.InterleavedPipeline(pipeline.model, pipeline.processor)
    made.load_seconds = 0.0
    monkeypatch.setattr(mg_fast.pipeline, "load", lambda path, **options: made)


@pytest.fixture
def run(published, capsys):
    """Runs a command of `mg-fast` on the tiny checkpoint and returns (exit code, stdout, stderr)."""

    def run(command, *arguments):
        options = ["--model", str(published), "--device", "cpu", "--dtype", "float32"]
        code = cli.main([command, *options, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_both_layouts(pipeline, published, tmp_path):
    assert isinstance(pipeline, mg_fast.InterleavedPipeline) and pipeline.dtype == torch.float32
    assert pipeline.load_seconds > 0 and str(pipeline.device) == "cpu" and pipeline.backend is None
    assert pipeline.weights.language_model + pipeline.weights.vision > 2**20
    pipeline.model.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    again = mg_fast.load(tmp_path, device="cpu", backend="torch", cuda_graphs=False)
    assert isinstance(again, mg_fast.InterleavedPipeline) and again.dtype == torch.float32
    picture = published / "image0.png"
    asked = dict(images=[picture], max_new_tokens=6)
    assert again.chat(WORDS, **asked).token_ids == pipeline.chat(WORDS, **asked).token_ids


def test_a_pipeline_of_the_other_family(standard, published):
    assert isinstance(mg_fast.load(standard, device="cpu"), mg_fast.Pipeline)
    with pytest.raises(CheckpointError, match="template=: not for this checkpoint, which belongs to MM-Interleaved"):
        mg_fast.load(published, template="gemma")
    with pytest.raises(CheckpointError, match="clip=: not for this checkpoint, which belongs to Mini-Gemini"):
        mg_fast.load(standard, clip="somewhere")


def test_it_cannot_be_copied(pipeline):
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copying(pipeline)


def test_warm_up_leaves_nothing(pipeline):
    assert pipeline.warm_up()["all"] > 0
    assert pipeline.decoder.prefixes.held_bytes == 0


def test_run(run, pipeline, published):
    picture = published / "image0.png"
    code, out, err = run("run", "--image", picture, "--prompt", WORDS, "--max-new-tokens", 6)
    assert (code, out) == (0, pipeline.chat(WORDS, [picture], max_new_tokens=6).text + "\n") and "template" not in err


def test_side_folders_elsewhere(run, published, tmp_path):
    """Commands take the folders that config.yaml does not find, as `load` does."""
    for name in ("config.yaml", "checkpoint"):
        (tmp_path / name).symlink_to(published / name)
    asked = ("run", "--model", tmp_path, "--prompt", "Hello.", "--max-new-tokens", 3)
    names = {"--llm": "vicuna-tiny", "--clip": "clip-tiny", "--diffusion": "sd-tiny"}
    sides = [part for option, name in names.items() for part in (option, published / name)]
    assert run(*asked)[0] == 3
    assert run(*asked, *sides)[:2] == run("run", "--prompt", "Hello.", "--max-new-tokens", 3)[:2]


@pytest.mark.usefixtures("loaded")
def test_run_as_a_document(run):
    code, out, _ = run("run", "--prompt", "Hello.", "--max-new-tokens", 3, "--json", "--profile")
    document = json.loads(out)
    assert code == 0 and document["image_tokens"] == 0 and [stage["name"] for stage in document["stages"]]


@pytest.mark.usefixtures("loaded")
def test_chat(run, pipeline, published, monkeypatch):
    picture = published / "image0.png"
    lines = iter([f"/image {picture}", WORDS, "And then", "/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_command.sys.stdin, "isatty", lambda: False, raising=False)
    code, out, _ = run("chat", "--max-new-tokens", 6)
    conversation = pipeline.conversation()
    first = conversation.chat(WORDS, [picture], max_new_tokens=6).text
    assert code == 0 and first in out and conversation.chat("And then", max_new_tokens=6).text in out


@pytest.mark.usefixtures("loaded")
def test_chat_draws_by_itself(run, pipeline, published, monkeypatch, tmp_path):
    picture, saved = published / "image0.png", tmp_path / "drawn.png"
    lines = iter([f"/image {picture}", "/draw two boats", f"/save {tmp_path / 'again.png'}", "/painter P", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_command.sys.stdin, "isatty", lambda: False, raising=False)
    code, out, _ = run("chat", "--steps", 1, "--out", saved)
    [expected] = pipeline.draw([picture, "two boats"], num_inference_steps=1)
    assert code == 0 and f"({saved})" in out and "/painter: this model draws by itself" in out
    for file in (saved, tmp_path / "again.png"):
        with Image.open(file) as drawn:
            assert drawn.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("loaded")
def test_commands_that_do_not_know_this_family_say_why(run, published, tmp_path, capsys):
    code, _, err = run("explain", "--image", published / "image0.png", "--out", tmp_path / "out.png")
    assert code == 3 and "a heat map shows the pixels that Mini-Gemini mines" in err
    code = cli.main(["compile", "--arch", "sm_90", "--model", str(published), "--training"])
    assert code == 6 and "backward pass cannot be compiled ahead of time" in capsys.readouterr().err
    assert run("warmup")[0] == 0
