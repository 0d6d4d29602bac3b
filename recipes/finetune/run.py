"""One training from its configuration to the model that it writes."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers

from . import saving, start
from .config import FULL, ConfigError, FineTuneConfig, OutputError
from .data import FineTuneData, to_batch
from .features import FeatureCache, feature_bytes
from .order import SampleOrder
from .prepare import (
    ADAPTERS,
    LOG,
    MODEL,
    RECORD,
    Prepared,
    check_output,
    prepare,
    prepare_output,
    training_arguments,
    write_record,
)
from .trainer import FineTuneTrainer, LogFile

logger = logging.getLogger(__name__)


def fine_tune(config: FineTuneConfig, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Trains, and returns the folder of the written model.

    A run that was stopped continues from its last checkpoint; one that had trained all its steps is only written
    again. Every process of a training calls this.

    Args:
        config: the configuration.
        callbacks: further callbacks of Trainer.

    Raises:
        ConfigError: the configuration does not fit the model, the data, the machine, or what `output` holds.
        CheckpointError, BackendError: the model cannot be loaded.
        OutputError: a file cannot be written, or no sample had a token to learn.
    """
    arguments = training_arguments(config)
    last, first_process = check_output(config), arguments.process_index == 0
    with arguments.main_process_first(local=False, desc="the output folder"):
        if first_process:
            prepare_output(config, fresh=last is None)
    prepared = prepare(config)
    check_output(config, prepared.sources)
    with start.loaded_whole(arguments.deepspeed_plugin):
        template = prepared.processor.template
        model = start.load_model(config, prepared.source, template=template, device=arguments.device)
    towers = FrozenTowers(model.model, device=arguments.device, dtype=getattr(torch, config.dtype))
    images = prepared.processor.image_processor
    cache = None if config.feature_cache is None else FeatureCache(config.feature_cache, towers, images)
    data = prepared.data(config, cache)
    if first_process:
        if last is None or not (config.output / RECORD).is_file():
            write_record(config, prepared.sources)
        _tell(config, data, prepared, towers, cache)

    tuned = start.choose_learning(model, config)
    if config.liger:
        apply_liger(model.model.language_model)
    # The classes of this model whose modules FSDP divides and gathers as one.
    layer = type(model.model.language_model.layers[0]).__name__
    model._no_split_modules = [layer, type(model.model.patch_mining).__name__]
    _gather_experts_as_one(arguments, model)
    passes = arguments.world_size * arguments.gradient_accumulation_steps
    grouped = config.group_by_length
    order = SampleOrder(
        data.lengths, config.per_device_batch, passes, seed=config.seed, grouped=grouped, processes=arguments.world_size
    )
    pad = prepared.processor.tokenizer.pad_token_id
    trainer = FineTuneTrainer(
        model=tuned,
        args=arguments,
        train_dataset=data,
        data_collator=partial(to_batch, pad_id=prepared.processor.filler_id if pad is None else pad),
        callbacks=[LogFile(config.output / LOG), *callbacks],
        towers=towers,
        images=images,
        order=order,
        cache=cache,
        times=config.learning_rate_times,
        mg_backend=config.backend,
    )
    trainer.train(resume_from_checkpoint=last)
    if first_process and (left_out := prepared.skipped.count()):
        logger.warning("left out: %d samples (%s)", left_out, prepared.skipped.path)
    if trainer.learned_nothing:
        raise OutputError(f"no token was learned, so nothing is written: see {prepared.skipped.path}")
    with saving.written_to(config.output):
        return _write(config, trainer, towers, prepared)


def apply_liger(language_model: nn.Module) -> None:
    """Puts Liger's kernels into the language model, by transformers' own function for them.

    It is called for the language model and not for the whole, whose type Liger does not know. Cross-entropy is
    exchanged in transformers' loss; the form that is fused with the head needs a class of Liger's list.

    Raises:
        ConfigError: the package is not installed.
    """
    from transformers.integrations.liger import apply_liger_kernel

    try:
        apply_liger_kernel(language_model, {"cross_entropy": True, "fused_linear_cross_entropy": False})
    except ImportError as error:
        raise ConfigError(f"liger: {error}") from None


def _gather_experts_as_one(arguments: TrainingArguments, model: nn.Module) -> None:
    """Lets ZeRO-3 gather Mixtral's experts as a whole, as in the original: in each pass other experts have no tokens.

    Mining must not be gathered so. deepspeed takes the gradients of such a module when those of its inputs are there,
    and mining's inputs have none. So deepspeed hooks its layers, and mining calls them (`CalledProjection`).
    """
    plugin = arguments.deepspeed_plugin
    kinds = {type(part) for part in model.modules() if type(part).__name__ == "MixtralSparseMoeBlock"}
    if plugin is None or plugin.zero_stage != 3 or not kinds:
        return
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list(kinds))


def _tell(
    config: FineTuneConfig, data: FineTuneData, prepared: Prepared, towers: FrozenTowers, cache: FeatureCache | None
) -> None:
    """Says how many samples there are, and what the cache of features will take."""
    broken = data.report_broken()
    told = f"; left out: {broken:,} ({prepared.skipped.path})" if broken else ""
    logger.warning("%d samples, %d of them with pictures%s", len(data), data.with_pictures, told)
    if cache is not None:
        cache.check_room(data.pictures, feature_bytes(towers.config, getattr(torch, config.dtype)))
        if config.epochs <= 1 and config.max_steps is None:
            logger.warning("feature_cache: in one epoch every picture is seen once, so nothing is saved")


def _write(config: FineTuneConfig, trainer: FineTuneTrainer, towers: FrozenTowers, prepared: Prepared) -> Path:
    """Writes what was trained, on the main process. All processes take part in collecting the weights."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    dtype, processor = getattr(torch, config.dtype), prepared.processor
    merges = config.method != FULL and config.lora.merge
    folder = config.output / (MODEL if config.method == FULL or merges else ADAPTERS)
    if trainer.is_world_process_zero():
        # Models that are made in order to write are not divided: other processes take no part in that.
        with start.loaded_whole(trainer.args.deepspeed_plugin):
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            if config.method != FULL:
                adapters = saving.write_low_rank(model, state, config, config.output / ADAPTERS, dtype)
                if merges:
                    saving.merge(config, prepared.source, adapters, processor, folder)
            elif config.stage == 1:
                saving.write_adapter(state, towers, model.config, folder, dtype)
            else:
                parts = model.config, model.generation_config, state
                saving.write_checkpoint(*parts, towers, processor, folder, dtype)
    trainer.accelerator.wait_for_everyone()
    return folder
