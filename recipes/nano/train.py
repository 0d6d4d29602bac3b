"""Trains nano from scratch: first each tower and the language model alone, then the two stages of Mini-Gemini's recipe,
then most of it once more, and wishes.

python -m recipes.nano.train OUT                 # with the high-resolution branch
python -m recipes.nano.train OUT --no-hr         # without it: the mined features are never added
python -m recipes.nano.train OUT                 # again: continues where it was stopped

The first stages teach the language model alone, so a run without the branch can take them over from a run with it:

python -m recipes.nano.train OTHER --no-hr --language OUT

OUT/model is the checkpoint, and its training.json says how long the training took. OUT/log.jsonl and OUT/loss.png hold
the losses.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from mg_fast import MiniGeminiProcessor
from mg_fast.ops.reference import low_resolution_views
from mg_fast.testing.environment import environment

from . import data, lessons
from .arithmetic import autocast, has_bfloat16
from .curve import draw_curve
from .losses import HEAVY, HINTED, blurred, chat_loss, normalise, page_loss, see, sight_loss, word_hints
from .model import EMBEDDING_SPREAD, LR_SIDE, forget_mined, make_model, save
from .optimizers import MUON, cosine, make_optimizers
from .stages import AVERAGED, STAGES, TOWERS, TrainingStage
from .towers import Codes, TowerHeads, low_loss

# What the stages of the language model taught, from which another run can go on: the language model and the codes, and
# what the run was.
LANGUAGE = "language.safetensors"


class Run:
    """A training run that can be stopped after any step and continued later."""

    def __init__(
        self,
        out: Path,
        *,
        seed: int,
        hr: bool,
        stages: tuple[TrainingStage, ...],
        device: str = "cpu",
        workers: int = 1,
        language: Path | None = None,
    ):
        self.out, self.seed, self.hr, self.device, self.workers = out, seed, hr, device, workers
        self.stages = tuple(stage for stage in stages if hr or stage.learns != ("vision_tower_aux",))
        out.mkdir(parents=True, exist_ok=True)
        self.model = make_model(seed)
        if not hr:
            forget_mined(self.model)
        self.heads = TowerHeads(self.model.config)
        with tempfile.TemporaryDirectory() as folder:
            # The processor is that of the finished checkpoint, which is not written before the training ends.
            save(self.model, Path(folder))
            self.processor = MiniGeminiProcessor.from_pretrained(folder)
            self.words = hashlib.sha256((Path(folder) / "tokenizer.model").read_bytes()).hexdigest()[:16]
        self.codes = Codes(self.processor.tokenizer, self.model.config.text_config.hidden_size, EMBEDDING_SPREAD)
        self.content = {
            name: torch.tensor(ids, device=device) for name, ids in data.content_ids(self.processor).items()
        }
        if device == "cpu":
            # In bfloat16 and at these lengths, fused attention takes twice the time on a CPU.
            self.model.model.language_model.set_attn_implementation("eager")
        self.model.to(device).train()
        self.heads.to(device), self.codes.to(device)
        self.threads = torch.get_num_threads()
        self.at, self.step, self.seconds = 0, 0, 0.0
        # The number of processes that have trained so far, and the machine on which the first of them began.
        self.starts, self.machine = 0, environment()
        # The stages whose result was taken over from another run.
        self.shared: list[str] = []
        self.optimizer_state = None
        # What the present stage began with, if its result is averaged with that.
        self.before: dict[str, torch.Tensor] = {}
        if (out / "last.pt").is_file():
            self._resume()
            if language is not None and not self.shared:
                raise SystemExit(
                    f"{out} holds a run that learns language itself: give another folder, or no --language"
                )
        elif language is not None:
            self._take_over(language)
        self._cut_log()

    def train(self, minutes: float | None = None) -> bool:
        """Runs the rest of the training, for at most `minutes`, and returns whether everything is done."""
        # This file is written last.
        record = self.out / "model" / "training.json"
        if self.at == len(self.stages) and record.is_file():
            return True
        # A finished run that goes on with further stages is not finished any more.
        record.unlink(missing_ok=True)
        self.starts += 1
        end = None if minutes is None else time.perf_counter() + 60 * minutes
        while self.at < len(self.stages):
            # A process that was killed just after the last of these stages had no time to write the file.
            if self.at == len(self._language_stages()) and not self.shared and not (self.out / LANGUAGE).is_file():
                self._keep_language()
            try:
                finished = self._stage(self.stages[self.at], end)
            finally:
                torch.set_num_threads(self.threads)
            if not finished:
                return False
            self.at, self.step, self.optimizer_state = self.at + 1, 0, None
        save(self.model, self.out / "model")
        record.write_text(json.dumps(self.record(), indent=1) + "\n")
        return True

    def record(self) -> dict:
        """What was trained and how long it took: `minutes` of every stage, waiting for pictures included.

        The steps of a killed process after its last saved state are not counted, nor is a process that saved no state.
        """
        ends = {
            row["stage"]: row["seconds"] for row in map(json.loads, (self.out / "log.jsonl").read_text().splitlines())
        }
        minutes = {
            stage: round((end - begin) / 60, 1) for (stage, end), begin in zip(ends.items(), (0.0, *ends.values()))
        }
        minutes["all"] = round(self.seconds / 60, 1)
        return {
            "seed": self.seed,
            "hr": self.hr,
            "device": self.device,
            "arithmetic": "bfloat16, by autocast" if has_bfloat16(self.device) else "float32",
            "starts": self.starts,
            "taken over": self.shared,
            "minutes": minutes,
            "machine": self.machine,
        }

    def _stage(self, stage: TrainingStage, end: float | None) -> bool:
        idle = () if self.hr else ("patch_mining", "vision_tower_aux")
        parts = {name: getattr(self.model.model, name) for name in stage.learns if name not in idle}
        # The discarded parts learn together with the modules that they serve.
        if set(stage.learns) & set(TOWERS):
            parts["heads"] = self.heads
        elif stage.told:
            parts["codes"] = self.codes
        self.model.requires_grad_(False)
        for part in parts.values():
            part.requires_grad_(True)
        learning = [p for part in parts.values() for p in part.parameters()]
        if stage.name in AVERAGED and self.step == 0:
            self.before = {name: p.detach().clone() for name, p in _named(parts).items()}
        optimizers = make_optimizers(stage, parts)
        if self.optimizer_state is not None:
            for optimizer, state in zip(optimizers, self.optimizer_state, strict=True):
                optimizer.load_state_dict(state)
        # One tower learns as fast as its pictures are drawn. A second thread would only take time from the drawing.
        drawn = self.device == "cpu" and len(stage.learns) == 1 and stage.learns[0] in TOWERS
        if drawn:
            torch.set_num_threads(max(1, self.threads - self.workers))
        batches = data.loader(functools.partial(self._batch, stage), self.step, stage.steps, self.workers)
        with (
            tqdm(total=stage.steps, initial=self.step, desc=stage.name, smoothing=0.02) as bar,
            (self.out / "log.jsonl").open("a") as log,
        ):
            began = time.perf_counter()
            for batch in batches:
                loss, shares = self._loss(stage, data.to_device(batch, self.device))
                for module in (self.model, self.heads, self.codes):
                    module.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for p in learning if p.grad is not None], 1.0)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = stage.rate * group["times"] * cosine(self.step, stage.steps)
                    optimizer.step()
                self.step += 1
                if stage.name in AVERAGED and self.step == stage.steps:
                    for name, parameter in _named(parts).items():
                        parameter.detach().lerp_(self.before[name], 0.5)
                    self.before = {}
                now = time.perf_counter()
                self.seconds, began = self.seconds + now - began, now
                row = {
                    "stage": stage.name,
                    "step": self.step,
                    "loss": round(loss.item(), 4),
                    "seconds": round(self.seconds, 1),
                }
                log.write(json.dumps(row | {k: round(v, 4) for k, v in shares.items() if not math.isnan(v)}) + "\n")
                bar.update()
                bar.set_postfix(
                    {"loss": f"{loss.item():.3f}", **{k: f"{v:.2f}" for k, v in shares.items()}}, refresh=False
                )
                stopped = end is not None and time.perf_counter() > end
                if stopped or self.step % 100 == 0 or self.step == stage.steps:
                    log.flush()
                    self._keep(optimizers)
                if stopped and self.step < stage.steps:
                    return False
        return True

    def _seed(self, stage: TrainingStage) -> int:
        """The seed of a stage, so that every stage has its own pictures and its own noise."""
        return self.seed * 100 + [s.name for s in STAGES].index(stage.name)

    def _batch(self, stage: TrainingStage, step: int) -> data.Batch:
        return lessons.batch(self.processor, stage, step, seed=self._seed(stage), hr=self.hr)

    def _loss(self, stage: TrainingStage, batch: data.Batch) -> tuple[torch.Tensor, dict[str, float]]:
        with autocast(self.device):
            beside = [
                (name, page_loss(self.model, self.heads, batch[name])) for name in ("page", "lines") if name in batch
            ]
            noise = torch.Generator().manual_seed(self._seed(stage) * 10**6 + self.step)
            if "facts" in batch:
                beside.append(("facts", self._main_loss(stage, batch["facts"], noise)))
            loss, shares = self._main_loss(stage, batch, noise) if "ids" in batch or "pixels" in batch else (0.0, {})
            for name, (other, its) in beside:
                loss, shares = loss + other, shares | {f"{name} {key}": share for key, share in its.items()}
            return loss, shares

    def _main_loss(
        self, stage: TrainingStage, batch: data.Batch, noise: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        embeddings = self.model.get_input_embeddings()
        if stage.told:
            codes = self.codes(batch, embeddings)
            if stage.noise:
                codes = blurred(codes, stage.noise, noise)
            hints = word_hints(self.processor.tokenizer, embeddings)
            return chat_loss(self.model, batch, self.content, codes, hints)
        if stage.lesson == "views":
            queries = self.model.model.low_resolution_queries(low_resolution_views(normalise(batch["pixels"]), LR_SIDE))
            return low_loss(self.heads, queries[:, 0], batch)
        if stage.lesson == "scenes":
            return sight_loss(self.model, self.heads, self.codes, batch, hr=self.hr)
        _, _, seen = see(self.model, normalise(batch["pixels"]), hr=self.hr, towers_learn=False)
        hints = word_hints(self.processor.tokenizer, embeddings) if "language_model" in stage.learns else None
        return chat_loss(self.model, batch, self.content, seen, hints)

    def _keep(self, optimizers: list[torch.optim.Optimizer]) -> None:
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "codes": self.codes.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        state |= {"before": self.before, "at": self.at, "step": self.step, "seconds": self.seconds}
        state |= {"starts": self.starts, "machine": self.machine, "shared": self.shared, "run": self._what()}
        # The state is first written under another name: a run that is killed while it writes must not lose its state.
        torch.save(state, self.out / "next.pt")
        os.replace(self.out / "next.pt", self.out / "last.pt")

    def _keep_language(self) -> None:
        modules = {"language_model": self.model.model.language_model, "codes": self.codes}
        learned = {
            f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
        }
        told = {"run": json.dumps(self._what()), "seconds": str(self.seconds)}
        # Half a file must not be taken for the whole one.
        save_file(learned, self.out / "next.safetensors", metadata=told)
        os.replace(self.out / "next.safetensors", self.out / LANGUAGE)

    def _what(self) -> dict:
        """The settings that must be the same where a run continues."""
        what = {"seed": self.seed, "hr": self.hr, "muon": MUON, "heavy": HEAVY, "hinted": HINTED, "words": self.words}
        return what | {"stages": [dataclasses.asdict(stage) for stage in self.stages]}

    def _resume(self) -> None:
        state = torch.load(self.out / "last.pt", map_location=self.device, weights_only=True)
        # Stages that have not begun may be changed.
        begun = state["at"] + 1
        for name, ours in self._what().items():
            theirs = state["run"][name]
            if name == "stages":
                theirs, ours = theirs[:begun], ours[:begun]
            if theirs != ours:
                raise SystemExit(
                    f"{self.out} holds a run of other {name}: "
                    f"give another folder (it holds {theirs}, asked for was {ours})"
                )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.codes.load_state_dict(state["codes"])
        self.at, self.step, self.seconds, self.optimizer_state = (
            state["at"],
            state["step"],
            state["seconds"],
            state["optimizers"],
        )
        self.starts, self.machine, self.shared = state["starts"], state["machine"], state["shared"]
        # Older states have none, because no stage was averaged.
        self.before = state.get("before", {})
        stage = self.stages[self.at]
        if stage.name in AVERAGED and 0 < self.step < stage.steps and not self.before:
            raise SystemExit(f"{self.out} holds a run that does not average {stage.name}: give another folder")
        if self.step == stage.steps:
            self.at, self.step, self.optimizer_state = self.at + 1, 0, None

    def _language_stages(self) -> tuple[TrainingStage, ...]:
        """The first stages, in which the language model learns alone: they are the same with and without the branch."""
        return tuple(itertools.takewhile(lambda stage: stage.learns == ("language_model",), self.stages))

    def _take_over(self, other: Path) -> None:
        """Begins after the stages of the language model, with what another run of the same seed learned in them."""
        if not (other / LANGUAGE).is_file():
            raise SystemExit(f"{other} holds no {LANGUAGE}: its run has not ended the stages of the language model")
        with safe_open(other / LANGUAGE, "pt", self.device) as file:
            told, learned = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        lessons = self._language_stages()
        runs = json.loads(json.dumps(self._what())), json.loads(told["run"])
        ours, theirs = ({**what, "stages": what["stages"][: len(lessons)]} for what in runs)
        for name in set(ours) - {"hr"}:
            if ours[name] != theirs[name]:
                raise SystemExit(
                    f"{other} holds a run of other {name}: it has {theirs[name]}, this run has {ours[name]}"
                )
        for name, module in (("language_model", self.model.model.language_model), ("codes", self.codes)):
            prefix = f"{name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in learned.items() if k.startswith(prefix)})
        self.at, self.seconds, self.shared = len(lessons), float(told["seconds"]), [stage.name for stage in lessons]
        rows = (other / "log.jsonl").read_text().splitlines(keepends=True)[: sum(stage.steps for stage in lessons)]
        (self.out / "log.jsonl").write_text("".join(rows))

    def _cut_log(self) -> None:
        """Keeps the log up to the point where the run continues; later steps of a killed run are repeated."""
        log = self.out / "log.jsonl"
        done = sum(stage.steps for stage in self.stages[: self.at]) + self.step
        rows = log.read_text().splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(rows[:done]))


def _named(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.nano.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, help="folder for the checkpoint and the log, from which the same command continues"
    )
    parser.add_argument("--no-hr", action="store_true", help="train without the high-resolution branch")
    parser.add_argument(
        "--language",
        type=Path,
        metavar="OTHER",
        help="take over the stages of the language model from another run of the same seed, with or without the branch",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the scenes (default: 0)")
    parser.add_argument(
        "--minutes", type=float, help="stop after this many minutes; the same command continues from there"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"expected a folder to train in, {args.out} is a file")
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"expected more than 0 minutes, got --minutes {args.minutes:g}")
    # The progress bar would be that of writing one small file.
    transformers_logging.disable_progress_bar()
    run = Run(args.out, seed=args.seed, hr=not args.no_hr, stages=STAGES, device=args.device, language=args.language)
    try:
        done = run.train(args.minutes)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the same command continues from the last full hundred steps") from None
    draw_curve(args.out / "log.jsonl", args.out / "loss.png")
    print(
        f"{args.out / 'model'} after {run.seconds / 60:.1f} minutes of training"
        if done
        else "not done yet: run the same command again"
    )


if __name__ == "__main__":
    main()
