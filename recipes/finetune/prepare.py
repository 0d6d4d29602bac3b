"""What comes before a model is loaded: the output folder, the processor, and one look at all samples."""

import dataclasses
import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from mg_fast import MiniGeminiProcessor

from . import start
from .config import ConfigError, FineTuneConfig
from .data import DatasetSource, FileSource, FineTuneData, SkippedSamples, open_sources
from .features import FeatureCache
from .labels import PLAIN, encode_turns, training_template

# Files and folders in the output of a training.
RECORD, LOG, SKIPPED, MODEL, ADAPTERS = "settings.json", "log.jsonl", "skipped.jsonl", "model", "adapters"
# The report of `check_samples`, which touches nothing of a run in the same folder.
CHECKED = "checked.jsonl"
# Settings that may differ where a run continues: they change neither the model nor what a step is made of.
FREE = ("output", "save_steps", "keep", "log_steps", "workers", "feature_cache", "device", "per_device_batch")
# Arguments of Trainer that only say what is told and how samples are brought; so do all that begin with logging_.
FREE_ARGUMENTS = (
    *("disable_tqdm", "report_to", "run_name", "log_level", "log_level_replica", "log_on_each_node", "save_strategy"),
    *("dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "skip_memory_metrics"),
)

logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """What a training needs beside its model.

    Attributes:
        source: the arguments of `from_pretrained` that say what is loaded.
        processor: of the model that is to be written.
        template: that the samples are rendered with; the processor's own, or "plain".
        sources: the samples.
        skipped: the report of those that are left out.
    """

    source: dict
    processor: MiniGeminiProcessor
    template: str
    sources: list[FileSource | DatasetSource]
    skipped: SkippedSamples

    def data(self, config: FineTuneConfig, cache: FeatureCache | None = None) -> FineTuneData:
        """The samples as a dataset."""
        encode = partial(encode_turns, self.processor, self.template, longest=config.max_length)
        images, plain = self.processor.image_processor, self.template == PLAIN
        return FineTuneData(self.sources, encode, images, self.skipped, plain=plain, cache=cache)


def prepare(config: FineTuneConfig, report: str = SKIPPED) -> Prepared:
    """Loads the processor and looks through the samples. `prepare_output` must have been called, by one process.

    Args:
        report: the name of the file that lists broken samples.

    Raises:
        ConfigError: a source cannot be read, none of its samples can be used, `max_length` has no room for a picture
            of theirs, or the model needs an adapter.
        CheckpointError: the processor cannot be loaded.
    """
    source = start.source_of(config)
    processor = start.load_processor(config, source)
    template = config.template or training_template(config.stage, processor.template)
    sources, places = open_sources(config.data, plain=template == PLAIN), processor.image_processor.tokens_per_picture
    if config.max_length <= places and any(words > 0 for found in sources for words in found.index.words):
        raise ConfigError(
            f"max_length: expected more than the {places:,} tokens of a picture, because samples have some, "
            f"got {config.max_length:,}"
        )
    return Prepared(source, processor, template, sources, SkippedSamples(config.output / report))


def training_arguments(config: FineTuneConfig) -> TrainingArguments:
    """The arguments of Trainer; making them also starts the communication between processes.

    Raises:
        ConfigError: an argument of `trainer:` is unknown or refused, or the batch cannot be divided.
    """
    on_cpu = config.device == "cpu" or (config.device is None and not torch.accelerator.is_available())
    if on_cpu and config.device is None:
        logger.warning("device: torch finds no GPU, so the training runs on the CPU")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, and torch finds no GPU")
    accumulation = config.accumulation(int(os.environ.get("WORLD_SIZE", 1)))
    options = dict(
        output_dir=str(config.output),
        per_device_train_batch_size=config.per_device_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        dataloader_num_workers=config.workers,
        seed=config.seed,
        data_seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=config.keep,
        logging_steps=config.log_steps,
        use_cpu=on_cpu,
    )
    # What follows may be set under `trainer:`.
    usual = dict(
        optim="adamw_torch",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
    )
    try:
        arguments = TrainingArguments(**options, **{**usual, **config.trainer})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"transformers refuses the arguments of the training: {error}") from None
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs: start one for each with accelerate launch, "
            "or show it a single one (CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments


def record_of(config: FineTuneConfig) -> dict:
    """The settings that a run must keep where it continues."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    settings["trainer"] = {
        name: value
        for name, value in settings["trainer"].items()
        if name not in FREE_ARGUMENTS and not name.startswith("logging_")
    }
    return {name: value for name, value in settings.items() if name not in FREE}


def samples_of(sources: list[FileSource | DatasetSource]) -> dict[str, str]:
    """By source the number of its samples, and a digest of where they lie, how long they are and which can be used."""
    found = {}
    for source in sources:
        digest = hashlib.sha256()
        for values in (source.index.offsets, source.index.sizes, source.index.words):
            digest.update(f"{len(values)} ".encode())
            digest.update(values)
        found[source.name] = f"{len(source.index.words)} samples, {digest.hexdigest()[:16]}"
    return found


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a folder; None where there is none.

    Trainer writes its own state last, so a run that was killed while it wrote leaves a folder without that file, or
    with a part of it.
    """
    found = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return str(max(found)[1]) if found else None


def _is_whole(path: Path) -> bool:
    """Whether a folder has what a run needs to continue. FSDP and deepspeed have folders for the optimizer's state."""
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    optimizer = [*path.glob("optimizer*"), *path.glob("global_step*")]
    return (
        path.name.rpartition("-")[2].isdigit()
        and isinstance(state, dict)
        and isinstance(state.get("global_step"), int)
        and bool(optimizer)
        and any(path.glob("rng_state*.pth"))
    )


def check_output(config: FineTuneConfig, sources: list[FileSource | DatasetSource] | None = None) -> str | None:
    """The checkpoint from which the run continues; None where it begins.

    Args:
        sources: the samples; None leaves them unchecked, because they are not read yet.

    Raises:
        ConfigError: the folder holds a run with other settings or samples; the message names them.
    """
    last, record = last_checkpoint(config.output), config.output / RECORD
    if last is None or not record.is_file():
        return last
    try:
        before, now = json.loads(record.read_text(encoding="utf-8")), record_of(config)
        before["trainer"] = record_of(dataclasses.replace(config, trainer=before.get("trainer", {})))["trainer"]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{record} cannot be read ({error}): remove it if the checkpoints beside it are of these settings"
        ) from None
    if sources is not None and "samples" in before:
        now["samples"] = samples_of(sources)
    if other := [name for name in now if before.get(name) != now[name]]:
        told = "; ".join(f"{name} {json.dumps(before.get(name))}, not {json.dumps(now[name])}" for name in other[:4])
        raise ConfigError(f"{config.output} holds checkpoints of a run with {told}: name another output folder")
    return last


def write_record(config: FineTuneConfig, sources: list[FileSource | DatasetSource]) -> None:
    """Writes the settings and samples of a run that begins. One process does it, after all have read the old ones."""
    record = {**record_of(config), "samples": samples_of(sources)}
    # Under another name first, so that no other process, and no later run, sees half of it.
    part = config.output / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, config.output / RECORD)


def prepare_output(config: FineTuneConfig, *, fresh: bool) -> None:
    """Makes the folder and, for stage 1 of a bare model, the adapter to start from.

    Args:
        fresh: the run begins, so what an earlier one reported is removed.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        for name in (SKIPPED, LOG) if fresh else ():
            (config.output / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {config.output} cannot be made: {error.strerror or error}") from None
    _prepare_start(config, anew=fresh)


def _prepare_start(config: FineTuneConfig, *, anew: bool) -> None:
    if config.stage != 1 or config.adapter is not None or start.is_checkpoint(config.model):
        return
    # Its last file.
    if anew or not (start.untrained_folder(config) / "config.json").is_file():
        start.write_untrained(config)


def check_samples(config: FineTuneConfig) -> tuple[int, int]:
    """Reads every sample as a training would, with its pictures; returns how many are broken, and how many there are.

    `checked.jsonl` in the output folder names the broken ones. Nothing of a run in that folder is changed.
    """
    fresh = check_output(config) is None
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / CHECKED).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {config.output} cannot be made: {error.strerror or error}") from None
    _prepare_start(config, anew=fresh)
    prepared = prepare(config, CHECKED)
    data = prepared.data(config)
    broken = data.report_broken()
    total = broken + len(data)
    return broken + sum(data[i] is None for i in range(len(data))), total
