"""The configuration of a training: one YAML file, read and checked before anything is loaded.

Where the original has a value, it is the default. docs/training.md lists the keys.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mg_fast.errors import MgFastError, quoted

SQUARE, PAD = "square", "pad"
FULL, LORA, QLORA = "full", "lora", "qlora"


class ConfigError(MgFastError, ValueError):
    """A configuration, or data that it names, with which no training can begin."""


class OutputError(MgFastError, RuntimeError):
    """What was trained cannot be written, or nothing was learned."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of samples.

    Attributes:
        file: a .json or .jsonl file in LLaVA's format. Either this or `dataset`.
        dataset: the name or folder of a Hugging Face dataset whose rows have LLaVA's keys.
        subset: the configuration of the dataset, where it has several.
        split: of the dataset.
        pictures: the folder that the paths of pictures are relative to.
        rename: parts of paths that are replaced, such as `VG_100K_2: images` for the original's data.
    """

    file: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    pictures: Path = Path(".")
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What reports call the source."""
        if self.file is not None:
            return str(self.file)
        return (
            f"{self.dataset} ({self.split})" if self.subset is None else f"{self.dataset} ({self.subset}, {self.split})"
        )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the language model's products; the defaults are LLaVA's.

    Attributes:
        rank, alpha, dropout: as in peft.
        picture_side: whether mining and projector are trained beside the adapters.
        merge: whether a whole model with the adapters merged into its weights is written, too.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    picture_side: bool = True
    merge: bool = True


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """All settings of a training; docs/training.md explains each of them."""

    stage: int
    model: str
    output: Path
    data: tuple[SourceConfig, ...]
    method: str = FULL
    adapter: str | None = None
    vision_tower: str | None = None
    vision_tower_aux: str | None = None
    hd: bool = False
    template: str | None = None
    image_mode: str | None = None
    max_length: int | None = None
    learning_rate: float | None = None
    learning_rate_times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    global_batch: int | None = None
    per_device_batch: int = 8
    epochs: float = 1.0
    max_steps: int | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = True
    group_by_length: bool | None = None
    workers: int = 4
    seed: int = 42
    save_steps: int = 500
    keep: int = 2
    log_steps: int = 1
    attention: str = "sdpa"
    backend: str | None = None
    device: str | None = None
    liger: bool = False
    feature_cache: Path | None = None
    lora: LoraSettings = LoraSettings()
    trainer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        adapters = self.method != FULL
        defaults = {
            "image_mode": SQUARE if self.stage == 1 else PAD,
            "max_length": 4096 if self.hd else 2048,
            "learning_rate": 1e-3 if self.stage == 1 else 2e-4 if adapters else 2e-5,
            "global_batch": 256 if self.stage == 1 else 128,
            "group_by_length": self.stage == 2,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def accumulation(self, processes: int) -> int:
        """The number of passes whose gradients are summed before a step, on so many processes.

        Raises:
            ConfigError: the global batch is no multiple of what all processes take in one pass.
        """
        at_once = self.per_device_batch * processes
        if self.global_batch % at_once:
            raise ConfigError(
                f"global_batch: expected a multiple of per_device_batch {self.per_device_batch} times "
                f"{processes} process(es), got {self.global_batch}"
            )
        return self.global_batch // at_once


def read_config(path: Path, changes: Mapping[str, str] | None = None) -> FineTuneConfig:
    """Reads and checks a file.

    Args:
        path: a YAML file. Relative paths in it are relative to the working directory.
        changes: values in YAML by key, which replace those of the file. A dot leads into a section: `lora.rank`.

    Raises:
        ConfigError: the file cannot be read, or holds keys or values that are not understood. The message names all.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(content).__name__}")
    for key, text in (changes or {}).items():
        _change(content, key, text)
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], where: str = "the configuration") -> FineTuneConfig:
    """The configuration that a mapping describes. `where` names it in messages; the errors are `read_config`'s."""
    faults: list[str] = []
    values = _read(FineTuneConfig, content, "", faults)
    if not faults:
        config = FineTuneConfig(**values)
        faults = list(_contradictions(config))
        if not faults:
            return config
    raise ConfigError(f"{where}: {'; '.join(faults[:6])}{f'; and {len(faults) - 6} more' if len(faults) > 6 else ''}")


def _change(content: dict, key: str, text: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {key}: {section} is no section")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {quoted(text)} is no YAML: {' '.join(str(error).split())}") from None


def _read(kind: type, content: Mapping, prefix: str, faults: list[str]) -> dict[str, Any]:
    """The values of a section by field; what is wrong with it goes to `faults`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            faults.append(f"{prefix}{key}: unknown{f', did you mean {prefix}{near[0]}?' if near else ''}")
    values = {}
    for name, field in fields.items():
        if content.get(name) is None:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required:
                faults.append(f"{prefix}{name}: missing")
            continue
        values[name] = _item(READERS[kind][name], content[name], f"{prefix}{name}", faults)
    return values


class _Unfit(Exception):
    """A value does not fit; the text says what was expected."""


Reader = Callable[[Any, str, list[str]], Any]


def _item(reader: Reader, value, name: str, faults: list[str]) -> Any:
    """What a reader makes of a value within a value; None where it does not fit, and the fault has the item's name."""
    try:
        return reader(value, name, faults)
    except _Unfit as unfit:
        faults.append(f"{name}: expected {unfit}, got {quoted(value)}")
    return None


def _text(value, name, faults) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Unfit("a text")
    return value


def _path(value, name, faults) -> Path:
    return Path(_text(value, name, faults)).expanduser()


def _flag(value, name, faults) -> bool:
    if not isinstance(value, bool):
        raise _Unfit("true or false")
    return value


def _whole(least: int) -> Reader:
    def read(value, name, faults) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _Unfit(f"a whole number of at least {least}")
        return value

    return read


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Reader:
    def read(value, name, faults) -> float:
        try:
            # YAML takes 1e-3, without a point, for a text.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (least < number if above else least <= number) or number > most or math.isinf(number):
            bound = f"a number {'above' if above else 'of at least'} {least:g}"
            raise _Unfit(bound + (f" and at most {most:g}" if most < math.inf else ""))
        return number

    return read


def _one_of(*choices) -> Reader:
    def read(value, name, faults):
        if isinstance(value, bool) or value not in choices:
            raise _Unfit(f"one of {', '.join(map(str, choices))}")
        return value

    return read


def _mapping(reader: Reader) -> Reader:
    def read(value, name, faults) -> dict:
        if not isinstance(value, dict):
            raise _Unfit("keys and values")
        return {str(key): _item(reader, item, f"{name}.{key}", faults) for key, item in value.items()}

    return read


def _section(kind: type) -> Reader:
    def read(value, name, faults):
        if not isinstance(value, dict):
            raise _Unfit("a section of keys and values")
        before = len(faults)
        values = _read(kind, value, f"{name}.", faults)
        return kind(**values) if len(faults) == before else None

    return read


def _sources(value, name, faults) -> tuple:
    if not isinstance(value, list) or not value:
        raise _Unfit("a list of sources, each with a file or a dataset")
    section = _section(SourceConfig)
    found = tuple(_item(section, item, f"{name}[{i}]", faults) for i, item in enumerate(value))
    for i, source in enumerate(found):
        if source is not None and (source.file is None) == (source.dataset is None):
            faults.append(f"{name}[{i}]: expected either a file or a dataset")
        if source is not None and source.file is not None and source.file.suffix not in (".json", ".jsonl"):
            faults.append(f"{name}[{i}].file: expected a .json or .jsonl file, got {quoted(str(source.file))}")
    return found


def _argument(value, name, faults) -> Any:
    # YAML reads the word no as false.
    return "no" if value is False and name.endswith("_strategy") else value


# How the values of a section's keys are read.
READERS: dict[type, dict[str, Reader]] = {
    SourceConfig: dict(file=_path, dataset=_text, subset=_text, split=_text, pictures=_path, rename=_mapping(_text)),
    LoraSettings: dict(rank=_whole(1), alpha=_whole(1), dropout=_number(0, 1), picture_side=_flag, merge=_flag),
    FineTuneConfig: dict(
        stage=_one_of(1, 2),
        model=_text,
        output=_path,
        data=_sources,
        method=_one_of(FULL, LORA, QLORA),
        adapter=_text,
        vision_tower=_text,
        vision_tower_aux=_text,
        hd=_flag,
        template=_one_of("plain", "vicuna_v1", "gemma", "mistral_instruct", "chatml_direct", "llama_3"),
        image_mode=_one_of(SQUARE, PAD),
        max_length=_whole(1),
        learning_rate=_number(0, above=True),
        learning_rate_times=_mapping(_number(0, above=True)),
        global_batch=_whole(1),
        per_device_batch=_whole(1),
        epochs=_number(0, above=True),
        max_steps=_whole(1),
        schedule=_one_of("cosine", "linear", "constant", "constant_with_warmup"),
        warmup=_number(0, 1),
        weight_decay=_number(0),
        max_grad_norm=_number(0),
        dtype=_one_of("bfloat16", "float32"),
        gradient_checkpointing=_flag,
        group_by_length=_flag,
        workers=_whole(0),
        seed=_whole(0),
        save_steps=_whole(1),
        keep=_whole(1),
        log_steps=_whole(1),
        attention=_one_of("sdpa", "eager", "flash_attention_2"),
        backend=_one_of("auto", "reference", "torch", "triton"),
        device=_one_of("cpu", "cuda"),
        liger=_flag,
        feature_cache=_path,
        lora=_section(LoraSettings),
        trainer=_mapping(_argument),
    ),
}

# Arguments of transformers' TrainingArguments that keys of this file set.
OWN_ARGUMENTS = {
    "output_dir": "output",
    "per_device_train_batch_size": "per_device_batch",
    "gradient_accumulation_steps": "global_batch",
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "bf16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "dataloader_num_workers": "workers",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "save_steps",
    "save_total_limit": "keep",
    "logging_steps": "log_steps",
    "use_cpu": "device",
    "use_liger_kernel": "liger",
}


def _contradictions(config: FineTuneConfig):
    """A sentence for every pair of settings that exclude each other."""
    if config.stage == 1:
        if config.method != FULL:
            yield f"method: stage 1 trains no language model, so {config.method} has nothing to adapt"
        if config.hd:
            yield "hd: the original trains no HD stage 1; stage 2 in HD starts from the stage-1 adapter of 768 pixels"
        if config.adapter is not None:
            yield "adapter: stage 1 makes the adapter; a run that was stopped continues by itself"
    elif config.template == "plain":
        yield "template: plain is for the captions of stage 1"
    if config.warmup >= 1:
        yield f"warmup: expected a share of all steps, below 1, got {config.warmup:g}"
    if config.liger and config.device == "cpu":
        yield "liger: its kernels need a GPU"
    for name in sorted(config.trainer.keys() & OWN_ARGUMENTS.keys()):
        yield f"trainer.{name}: the key {OWN_ARGUMENTS[name]} of this file sets it"
    if config.trainer.get("save_only_model"):
        yield "trainer.save_only_model: a run that was stopped could not continue"
