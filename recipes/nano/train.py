"""Trains nano from nothing: towers and language model each by themselves, then the two stages of Mini-Gemini's recipe.

python -m recipes.nano.train OUT                 # with the high-resolution branch
python -m recipes.nano.train OUT --no-hr         # without: the mined features are never added
python -m recipes.nano.train OUT                 # again: goes on where it was stopped

OUT/model is the checkpoint, with training.json, which says what it took; OUT/log.jsonl and OUT/loss.png are the losses.
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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.ops.reference import low_resolution_views
from mg_fast.ops.torch.dual_resize import CLIP_MEAN, CLIP_STD
from mg_fast.testing.environment import environment

from . import data
from .model import EMBEDDING_SPREAD, LR_SIDE, forget_mined, make_model, save
from .scenes import draw_lines, draw_numbers
from .towers import Codes, TowerHeads, character_loss, high_loss, low_loss, token_loss


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """One part of the training: how long, how fast, and which of the model's modules learn.

    Args:
        faster: those of them that learn at three times the rate.
        told: scenes are told in codes in place of pictures: arguments of `data.told`.
        noise: how far codes are off, beside a spread of 0.3 of every word in them; image tokens, which come in their
            place, never match them quite.
    """

    name: str
    steps: int
    batch: int
    rate: float
    learns: tuple[str, ...]
    faster: tuple[str, ...] = ()
    told: dict | None = None
    noise: float = 0.0


TOWERS = ("vision_tower", "vision_tower_aux")
BRIDGE = ("mm_projector", "patch_mining")
# answers alone, without the turns of a conversation around them: many to a scene
FACTS = dict(cells=36, turns=16, answers_only=True)
TALK = dict(cells=36, turns=6, answers_only=False)
STAGES = (
    TrainingStage("digits", 1200, 32, 3e-3, ("vision_tower_aux",)),
    TrainingStage("numbers", 1800, 12, 2e-3, ("vision_tower_aux",)),
    TrainingStage("lookup", 450, 32, 3e-3, ("language_model",), told=FACTS | {"cells": 6}),
    TrainingStage("search", 200, 32, 2e-3, ("language_model",), told=FACTS, noise=0.4),
    TrainingStage("language", 900, 10, 2e-3, ("language_model",), told=TALK, noise=0.4),
    TrainingStage("views", 500, 64, 2e-3, ("vision_tower",)),
    # towers go on, what stands on them begins
    TrainingStage("scenes", 1000, 12, 5e-4, (*TOWERS, *BRIDGE), faster=BRIDGE),
    TrainingStage("alignment", 150, 16, 1e-3, BRIDGE),
    TrainingStage("everything", 900, 10, 5e-4, (*BRIDGE, "language_model")),
)
# so many times AdamW's rate Muon's is, and its decay with it: it learned faster than at AdamW's own
MUON = 3
BY_MUON = (*TOWERS, *BRIDGE, "language_model")
# so many times what another token does weigh digits, which are few, and places, which were learned last: every cell has
# one
HEAVY = {"digit": 3.0, "place": 3.0}
# what the curve shows of reading: shares in the log
READ = {
    "whole numbers, HR tower on pages": ("page number", "C0"),
    "whole numbers, image tokens by nearest code": ("token number", "C1"),
    "single digits, language model": ("digit", "C2"),
}


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] as the processor would have them: float32 [B, 3, H, W]."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def see(
    model: MiniGeminiForConditionalGeneration, pixels: torch.Tensor, *, hr: bool, towers_learn: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor] | None, torch.Tensor]:
    """Normalised pictures [n, 3, 192, 192] to queries [n, 1, 36, D], stage maps, and image tokens [n, 36, hidden].

    Without `hr` there are no stage maps, and nothing is mined.
    """
    inner = model.model
    views = low_resolution_views(pixels, LR_SIDE)

    def tower(run: Callable) -> Callable:
        return run if towers_learn else torch.no_grad()(lambda pictures: run(pictures))

    if not hr:
        queries = tower(inner.low_resolution_queries)(views)
        return queries, None, inner.mm_projector(queries.flatten(1, 2))
    parts = {"see_low": tower(inner.low_resolution_queries), "see_high": tower(inner.vision_tower_aux)}
    features = inner.picture_features(views, pixels, **parts)
    return features.queries, features.pyramid, features.image_tokens


def chat_loss(
    model: MiniGeminiForConditionalGeneration, batch: data.Batch, content: dict[str, torch.Tensor], seen: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss on the answers' tokens alone with pictures `seen` as image tokens; how often a token, and one of each
    content, is right.
    """
    inner = model.model
    embeds = inner.splice(inner.get_input_embeddings()(batch["ids"]), seen, batch["marks"])
    hidden = inner.language_model(inputs_embeds=embeds, attention_mask=batch["mask"], use_cache=False).last_hidden_state
    said = batch["answers"][:, 1:] == 1
    scores, wanted = model.lm_head(hidden[:, :-1][said]).float(), batch["ids"][:, 1:][said]
    right = scores.argmax(-1) == wanted
    shares = {name: _mean(right[torch.isin(wanted, ids)]) for name, ids in content.items()}
    weight = scores.new_ones(scores.shape[-1])
    for name, times in HEAVY.items():
        weight[content[name]] = times
    return F.cross_entropy(scores, wanted, weight=weight), {"token": _mean(right), **shares}


def code_loss(seen: torch.Tensor, wanted: torch.Tensor, things: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Squared error of image tokens [B, T, hidden] against codes, and how much of the spread among cells with `things`
    [B, T] is explained.

    Such cells are few: they weigh five times as much.
    """
    off = (seen.float() - wanted).square().mean(-1)
    weight = 1.0 + 4.0 * things
    spread = (wanted[things] - wanted[things].mean(0)).square().mean()
    return (off * weight).sum() / weight.sum() / spread, {"explained": 1 - (off[things].mean() / spread).item()}


def blurred(codes: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Codes [B, N, width] as image tokens will be: most of them too weak, and each off by some noise."""
    strength = torch.empty(*codes.shape[:2], 1).uniform_(0.7, 1.1, generator=generator)
    off = noise * torch.randn(codes.shape, generator=generator)
    return codes * strength.to(codes.device) + off.to(codes.device)


def _mean(flags: torch.Tensor) -> float:
    return flags.float().mean().item() if len(flags) else float("nan")


def page_loss(
    model: MiniGeminiForConditionalGeneration, heads: TowerHeads, page: data.Batch
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the high-resolution tower on pages of print; lines of print have characters, but no cells."""
    compute = high_loss if bool((page["kind"] > 0).any()) else character_loss
    return compute(heads, model.model.vision_tower_aux(normalise(page["pixels"])), page)


def sight_loss(
    model: MiniGeminiForConditionalGeneration, heads: TowerHeads, codes: Codes, batch: data.Batch, *, hr: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of all that sees, on scenes: of the towers under the heads that are thrown away, of image tokens against
    codes.
    """
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        tables, wanted = codes.tables(embeddings), codes(batch, embeddings)
    queries, pyramid, seen = see(model, normalise(batch["pixels"]), hr=hr)
    # squared error alone would learn what is common, and no digit for long; nearness alone not how large a token is to
    # be
    far, near = code_loss(seen, wanted, batch["kind"].flatten(1) > 0), token_loss(tables, seen, batch)
    parts = {"low": low_loss(heads, queries[:, 0], batch), "token": near, "code": (6 * far[0], far[1])}
    if hr:
        parts["high"] = high_loss(heads, pyramid, batch)
    return sum(loss for loss, _ in parts.values()), {
        f"{part} {name}": share for part, (_, shares) in parts.items() for name, share in shares.items()
    }


class Run:
    """A training run that can be stopped after any step and taken up again."""

    def __init__(
        self,
        out: Path,
        *,
        seed: int,
        hr: bool,
        stages: tuple[TrainingStage, ...],
        device: str = "cpu",
        workers: int = 1,
    ):
        self.out, self.seed, self.hr, self.device, self.workers = out, seed, hr, device, workers
        self.stages = tuple(stage for stage in stages if hr or stage.learns != ("vision_tower_aux",))
        out.mkdir(parents=True, exist_ok=True)
        self.model = make_model(seed)
        if not hr:
            forget_mined(self.model)
        self.heads = TowerHeads(self.model.config)
        with tempfile.TemporaryDirectory() as folder:
            # of the finished checkpoint, which is not written before it is finished
            save(self.model, Path(folder))
            self.processor = MiniGeminiProcessor.from_pretrained(folder)
            self.words = hashlib.sha256((Path(folder) / "tokenizer.model").read_bytes()).hexdigest()[:16]
        self.codes = Codes(self.processor.tokenizer, self.model.config.text_config.hidden_size, EMBEDDING_SPREAD)
        self.content = {
            name: torch.tensor(ids, device=device) for name, ids in data.content_ids(self.processor).items()
        }
        if device == "cpu":
            # in bfloat16 the fused one takes twice a CPU's time at these lengths
            self.model.model.language_model.set_attn_implementation("eager")
        self.model.to(device).train()
        self.heads.to(device), self.codes.to(device)
        self.at, self.step, self.seconds = 0, 0, 0.0
        # processes that trained so far, and where the first of them began
        self.starts, self.machine = 0, environment()
        self.optimizer_state = None
        if (out / "last.pt").is_file():
            self._resume()
        self._cut_log()

    def train(self, minutes: float | None = None) -> bool:
        """Runs what is left, for so many minutes at most; whether all is done."""
        # written last
        record = self.out / "model" / "training.json"
        if self.at == len(self.stages) and record.is_file():
            return True
        self.starts += 1
        end = None if minutes is None else time.perf_counter() + 60 * minutes
        while self.at < len(self.stages):
            if not self._stage(self.stages[self.at], end):
                return False
            self.at, self.step, self.optimizer_state = self.at + 1, 0, None
        save(self.model, self.out / "model")
        record.write_text(json.dumps(self.record(), indent=1) + "\n")
        return True

    def record(self) -> dict:
        """What was trained and what it took: `minutes` of every stage, waiting for its pictures included.

        Steps that a killed process had made beyond what it kept are not counted, nor is a process that kept none.
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
            "starts": self.starts,
            "minutes": minutes,
            "machine": self.machine,
        }

    def _stage(self, stage: TrainingStage, end: float | None) -> bool:
        idle = () if self.hr else ("patch_mining", "vision_tower_aux")
        parts = {name: getattr(self.model.model, name) for name in stage.learns if name not in idle}
        # what is thrown away learns with what it is for
        if set(stage.learns) & set(TOWERS):
            parts["heads"] = self.heads
        elif stage.told:
            parts["codes"] = self.codes
        self.model.requires_grad_(False)
        for part in parts.values():
            part.requires_grad_(True)
        learning = [p for part in parts.values() for p in part.parameters()]
        optimizers = _optimizers(stage, parts)
        if self.optimizer_state is not None:
            for optimizer, state in zip(optimizers, self.optimizer_state, strict=True):
                optimizer.load_state_dict(state)
        batches = data.loader(functools.partial(self._batch, stage), self.step, stage.steps, self.workers)
        with (
            tqdm(total=stage.steps, initial=self.step, desc=stage.name, smoothing=0.02) as bar,
            (self.out / "log.jsonl").open("a") as log,
        ):
            began = time.perf_counter()
            for batch in batches:
                loss, said = self._loss(stage, data.to_device(batch, self.device))
                for module in (self.model, self.heads, self.codes):
                    module.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for p in learning if p.grad is not None], 1.0)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = stage.rate * group["times"] * _cosine(self.step, stage.steps)
                    optimizer.step()
                self.step += 1
                now = time.perf_counter()
                self.seconds, began = self.seconds + now - began, now
                row = {
                    "stage": stage.name,
                    "step": self.step,
                    "loss": round(loss.item(), 4),
                    "seconds": round(self.seconds, 1),
                }
                log.write(json.dumps(row | {k: round(v, 4) for k, v in said.items() if not math.isnan(v)}) + "\n")
                bar.update()
                bar.set_postfix(
                    {"loss": f"{loss.item():.3f}", **{k: f"{v:.2f}" for k, v in said.items()}}, refresh=False
                )
                stopped = end is not None and time.perf_counter() > end
                if stopped or self.step % 100 == 0 or self.step == stage.steps:
                    log.flush()
                    self._keep(optimizers)
                if stopped and self.step < stage.steps:
                    return False
        return True

    def _seed(self, stage: TrainingStage) -> int:
        """A stage has its own pictures, and its own noise."""
        return self.seed * 100 + [s.name for s in STAGES].index(stage.name)

    def _batch(self, stage: TrainingStage, step: int) -> data.Batch:
        seed = self._seed(stage)
        told = functools.partial(data.told, self.processor, seed, step, stage.batch)
        facts = functools.partial(data.told, self.processor, -1 - seed, step, stage.batch, **FACTS)
        match stage.name:
            case "digits":
                return {"page": data.pages(draw_lines, seed, step, stage.batch)}
            case "numbers":
                pages = data.pages(draw_numbers, seed, step, stage.batch)
                return {"page": pages, "lines": data.pages(draw_lines, seed, step, stage.batch)}
            case "lookup" | "search":
                return told(**stage.told)
            case "language":
                # what answers alone taught is forgotten where they stop
                return told(**stage.told) | {"facts": facts(described=0.3)}
            case "views":
                return data.scenes(seed, step, stage.batch)
            case "scenes":
                # so that the tower goes on with what it can do while it learns shapes
                pages = {"page": data.pages(draw_numbers, seed, step, stage.batch // 2)} if self.hr else {}
                return data.scenes(seed, step, stage.batch) | pages
            case "alignment":
                # as captions in the original: all that is to be said about a picture
                return told(**FACTS, shown=True)
            case "everything":
                beside = facts(shown=True, described=0.4)
                return data.conversations(self.processor, seed, step, stage.batch) | {"facts": beside}
        raise ValueError(f"no stage {stage.name!r}")

    def _loss(self, stage: TrainingStage, batch: data.Batch) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.autocast(self.device, torch.bfloat16):
            beside = [
                (name, page_loss(self.model, self.heads, batch[name])) for name in ("page", "lines") if name in batch
            ]
            noise = torch.Generator().manual_seed(self._seed(stage) * 10**6 + self.step)
            if "facts" in batch:
                beside.append(("facts", self._main_loss(stage, batch["facts"], noise)))
            loss, said = self._main_loss(stage, batch, noise) if "ids" in batch or "pixels" in batch else (0.0, {})
            for name, (other, shares) in beside:
                loss, said = loss + other, said | {f"{name} {key}": share for key, share in shares.items()}
            return loss, said

    def _main_loss(
        self, stage: TrainingStage, batch: data.Batch, noise: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        embeddings = self.model.get_input_embeddings()
        if stage.told:
            codes = self.codes(batch, embeddings)
            if stage.noise:
                codes = blurred(codes, stage.noise, noise)
            return chat_loss(self.model, batch, self.content, codes)
        if stage.name == "views":
            queries = self.model.model.low_resolution_queries(low_resolution_views(normalise(batch["pixels"]), LR_SIDE))
            return low_loss(self.heads, queries[:, 0], batch)
        if stage.name == "scenes":
            return sight_loss(self.model, self.heads, self.codes, batch, hr=self.hr)
        _, _, seen = see(self.model, normalise(batch["pixels"]), hr=self.hr, towers_learn=False)
        return chat_loss(self.model, batch, self.content, seen)

    def _keep(self, optimizers: list[torch.optim.Optimizer]) -> None:
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "codes": self.codes.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        state |= {"at": self.at, "step": self.step, "seconds": self.seconds}
        state |= {"starts": self.starts, "machine": self.machine, "run": self._what()}
        # a run that is killed while it writes must not lose what it had
        torch.save(state, self.out / "next.pt")
        os.replace(self.out / "next.pt", self.out / "last.pt")

    def _what(self) -> dict:
        """What must be the same where a run goes on."""
        what = {"seed": self.seed, "hr": self.hr, "muon": MUON, "heavy": HEAVY, "words": self.words}
        return what | {"stages": [dataclasses.asdict(stage) for stage in self.stages]}

    def _resume(self) -> None:
        state = torch.load(self.out / "last.pt", map_location=self.device, weights_only=True)
        for name, ours in self._what().items():
            if (theirs := state["run"][name]) != ours:
                raise SystemExit(
                    f"{self.out} holds a run of other {name}: give another folder (there: {theirs}; asked for: {ours})"
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
        self.starts, self.machine = state["starts"], state["machine"]
        if self.step == self.stages[self.at].steps:
            self.at, self.step, self.optimizer_state = self.at + 1, 0, None

    def _cut_log(self) -> None:
        """Leaves the rows up to where the run goes on: steps of a killed run beyond what it kept are made again."""
        log = self.out / "log.jsonl"
        done = sum(stage.steps for stage in self.stages[: self.at]) + self.step
        rows = log.read_text().splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(rows[:done]))


def _optimizers(stage: TrainingStage, parts: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan et al. 2024) for the matrices of `BY_MUON`; every group's `times` multiplies the stage's
    rate.
    """
    betas, decay = ((0.9, 0.95), 0.1) if stage.told else ((0.9, 0.98), 0.01)
    plain, matrices = [], []
    for name, part in parts.items():
        times = 3 if name in stage.faster else 1
        tables = {m.weight for m in part.modules() if isinstance(m, nn.Embedding)}
        muon = [p for p in part.parameters() if name in BY_MUON and p.dim() == 2 and p not in tables]
        ours = set(muon)
        plain.append({"params": [p for p in part.parameters() if p not in ours], "times": times})
        if muon:
            matrices.append({"params": muon, "times": MUON * times})
    optimizers = [torch.optim.AdamW(plain, lr=stage.rate, betas=betas, weight_decay=decay)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=stage.rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _cosine(step: int, steps: int) -> float:
    warm = max(1, round(0.03 * steps))
    return (
        (step + 1) / warm
        if step < warm
        else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


def _smooth(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).unfold(0, min(20, len(values)), 1).mean(-1)


def draw_curve(log: Path, picture: Path) -> None:
    """The losses of a run, stage by stage, and how much it reads, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (axes, reads) = pyplot.subplots(2, figsize=(9, 7), sharex=True)
    first = 0
    for name, group in itertools.groupby(rows, lambda row: row["stage"]):
        group = list(group)
        smooth = _smooth([row["loss"] for row in group])
        axes.plot(range(first, first + len(smooth)), smooth, label=name)
        for key, colour in READ.values():
            shares = [(first + i, row[key]) for i, row in enumerate(group) if key in row]
            if len(shares) > 1:
                smooth = _smooth([share for _, share in shares])
                reads.plot([at for at, _ in shares][: len(smooth)], smooth, colour)
        first += len(group)
    axes.set(ylabel="loss (each stage has its own)", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    reads.set(xlabel="step", ylabel="share that is right, in training")
    for what, (_, colour) in READ.items():
        reads.plot([], [], colour, label=what)
    # the aim for whole numbers
    reads.axhline(0.95, color="gray", linestyle=":", label="0.95")
    reads.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(picture, dpi=80, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-hr", action="store_true", help="train without the high-resolution branch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on from there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"expected a folder to train in, {args.out} is a file")
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"expected more than no time, got --minutes {args.minutes:g}")
    # of writing one small file
    transformers_logging.disable_progress_bar()
    run = Run(args.out, seed=args.seed, hr=not args.no_hr, stages=STAGES, device=args.device)
    try:
        done = run.train(args.minutes)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the same command goes on from the last hundred steps") from None
    draw_curve(args.out / "log.jsonl", args.out / "loss.png")
    print(
        f"{args.out / 'model'} after {run.seconds / 60:.1f} minutes of training"
        if done
        else "not done yet: run the same command again"
    )


if __name__ == "__main__":
    main()
