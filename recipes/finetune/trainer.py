"""transformers' Trainer with the frozen towers beside the model, the original's learning rates, and its order."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from mg_fast import use_backend
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers, TowerFeatures
from mg_fast.models.mini_gemini.image_processing import MiniGeminiImageProcessor

from .config import ConfigError
from .features import FeatureCache
from .order import SampleOrder
from .saving import written_to

# The weights that learn, in the folder of a checkpoint that a run continues from.
LEARNED_FILE = "learned.safetensors"

logger = logging.getLogger(__name__)


class FineTuneTrainer(Trainer):
    """Trains a model whose towers were taken out.

    A checkpoint, `checkpoint-N`, holds what a run needs to continue: the weights that learn under the names that they
    have here, the optimizer, and the states of the random numbers. FSDP and deepspeed write their own files in it.

    Args:
        towers: compute the features of pictures, on the training's device.
        images: makes pixels of squared pictures.
        order: of the samples.
        cache: keeps features of new pictures.
        times: factors of the learning rate by parts of parameters' names.
        mg_backend: the backend of this package; None leaves the choice in force.
        **arguments: of Trainer.

    Raises:
        ConfigError: a part of a name is in no weight that learns.
    """

    def __init__(
        self,
        *,
        towers: FrozenTowers,
        images: MiniGeminiImageProcessor,
        order: SampleOrder,
        cache: FeatureCache | None = None,
        times: Mapping[str, float] | None = None,
        mg_backend: str | None = None,
        **arguments,
    ):
        super().__init__(**arguments)
        self._towers, self._images, self._order, self._cache = towers, images, order, cache
        self._times, self._mg_backend = dict(times or {}), mg_backend
        # Tokens that were learned since the process began, by all processes. It is not read in every step.
        self._learned: torch.Tensor | int = 0
        self._warned = False
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for part in self._times:
            if not any(part in name for name in names):
                raise ConfigError(f"learning_rate_times: no weight that learns has {part!r} in its name")
        self.add_callback(_EpochOfOrder(order))

    @property
    def learned_nothing(self) -> bool:
        """Whether steps were trained, also before the run was continued, and none of them had a token to learn."""
        logged = any(row.get("loss") for row in self.state.log_history)
        return self.state.global_step > 0 and not int(self._learned) and not logged

    def log(self, logs: dict[str, float], *more, **options) -> None:
        super().log(logs, *more, **options)
        if "loss" in logs and not self._warned and self.learned_nothing:
            self._warned = True
            logger.warning("step %d: no token was learned yet; all samples were left out", self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        pictures = inputs.pop("pictures")
        if isinstance(num_items_in_batch, torch.Tensor):
            self._learned = self._learned + num_items_in_batch
            # All samples of a step may be broken. Their loss is a sum of nothing, which must not be divided by zero.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        with use_backend(self._mg_backend):
            inputs["tower_features"] = self._features(pictures)
            if not pictures:
                del inputs["mm_token_type_ids"]
            return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)

    def _features(self, pictures: list[dict]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The features of a batch's pictures in order; what is not in the cache is computed, and then put there."""
        if not pictures:
            return self._towers.nothing()
        new = [i for i, picture in enumerate(pictures) if "squared" in picture]
        found: list[TowerFeatures | None] = [None] * len(pictures)
        if new:
            seen = self._towers(**self._images.pixels_of(torch.stack([pictures[i]["squared"] for i in new])))
            if len(new) == len(pictures) and self._cache is None:
                return seen
            for row, i in enumerate(new):
                found[i] = TowerFeatures(seen.queries[row], [level[row] for level in seen.pyramid])
                if self._cache is not None:
                    self._cache.write(pictures[i]["key"], found[i])
        rows = [
            TowerFeatures(picture["queries"], picture["pyramid"]) if seen is None else seen
            for picture, seen in zip(pictures, found)
        ]
        return TowerFeatures(
            torch.stack([row.queries for row in rows]),
            [torch.stack(levels) for levels in zip(*(row.pyramid for row in rows))],
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over groups of weights: with and without weight decay, and one pair for each factor of the rate."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                factor = next((times for part, times in self._times.items() if part in name), 1.0)
                groups.setdefault((factor, name in decayed), []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        rate = options.pop("lr", self.args.learning_rate)
        self.optimizer = kind(
            [
                {"params": weights, "lr": rate * factor, "weight_decay": self.args.weight_decay if decays else 0.0}
                for (factor, decays), weights in groups.items()
            ],
            lr=rate,
            **options,
        )
        return self.optimizer

    def _run_epoch(self, *arguments, **options) -> None:
        # Trainer looks for the end behind a step, so a run that is finished would train one more where it continues.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    def _save_checkpoint(self, *arguments, **options) -> None:
        with written_to(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*arguments, **options)

    def _get_train_sampler(self, train_dataset=None) -> SampleOrder:
        return self._order

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # They write the weights in files of their own, each process its part.
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        learned = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters()
            if parameter.requires_grad
        }
        save_file(learned, folder / LEARNED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / LEARNED_FILE
        if not file.is_file():
            raise ConfigError(f"{file.parent} has no {LEARNED_FILE}: it is no checkpoint of this kind of training")
        learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        stored = load_file(file)
        if other := sorted(learned.keys() ^ stored.keys()):
            raise ConfigError(f"{file} holds {len(stored)} weights and {len(learned)} learn here, not both {other[0]}")
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(stored[name])


class _EpochOfOrder(TrainerCallback):
    """Tells the order which epoch begins. Under a data-parallel loader Trainer does not reach it."""

    def __init__(self, order: SampleOrder):
        self._order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._order.set_epoch(int((state.epoch or 0.0) + 1e-6))


class LogFile(TrainerCallback):
    """Appends what Trainer logs to a file, one line of JSON for each step, so that it is not lost with the process."""

    def __init__(self, path: Path):
        self._path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
