"""Trains nano's painter from scratch: an autoencoder, then a UNet and two text encoders in its latents.

python -m recipes.nano.train_painter OUT         # at most two hours on two cores
python -m recipes.nano.train_painter OUT         # again: continues where it was stopped

OUT/painter is the pipeline, in the layout of SDXL and in half precision. OUT/log.jsonl and OUT/loss.png hold the
losses, and OUT/samples what was drawn on the way. OUT/round-trip.json says how many numbers nano still reads in
pictures that were encoded and decoded.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.testing.environment import environment

from .arithmetic import autocast
from .optimizers import cosine
from .painting import autoencoder, diffusion
from .painting.check import check
from .painting.curve import draw_curve
from .painting.optimizers import make_optimizers
from .painting.parts import CHANNELS, LATENT_SIDE, make_parts, save
from .painting.reading import read_numbers
from .painting.wishes import draw_wish, numbered_wish, phrased, picture, random_wish

AUTOENCODER = {"steps": 8_000, "batch": 4, "rate": 1e-3}
LATENTS = {"count": 40_000, "batch": 32}
DIFFUSION = {"steps": 13_000, "scattered": 7_400, "batch": 16, "rate": 1e-3, "average": 0.999}
# The trained modules of the second lesson.
LEARNS = ("unet", "text_encoder", "text_encoder_2")
# After so many steps the state is saved, and after so many steps pictures are drawn and checked.
KEEP_EVERY, SAMPLE_EVERY = 200, 1000
# The number of scenes with a number that take the round trip, and of wishes drawn on the way.
ROUND_TRIPS, WISHES = 300, 32


class Run:
    """A training run that can be stopped after any step and continued later."""

    def __init__(self, out: Path, *, seed: int, device: str = "cpu"):
        self.out, self.seed, self.device = out, seed, device
        (out / "samples").mkdir(parents=True, exist_ok=True)
        rng = random.Random("words")
        self.parts = make_parts([phrased(random_wish(rng), rng) for _ in range(3000)], seed)
        for module in self.modules.values():
            module.to(device)
        # In training on a CPU, attention in plain steps takes a fifth less time of a step than the fused form.
        self.parts["unet"].set_attn_processor(AttnProcessor())
        self.average = EMAModel(self._learning(), decay=DIFFUSION["average"], use_ema_warmup=True, power=0.75)
        self.steps = {"autoencoder": 0, "scattered latents": 0, "latents": 0, "diffusion": 0}
        self.seconds = dict.fromkeys(self.steps, 0.0)
        self.starts, self.machine = 0, environment()
        self.latents: dict[str, torch.Tensor | None] = dict.fromkeys(("scattered latents", "latents"))
        self._optimizer_states = None
        if (out / "last.pt").is_file():
            self._resume()

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in self.parts.items() if isinstance(part, torch.nn.Module)}

    def train(self, minutes: float | None = None) -> bool:
        """Runs the rest of the training, for at most `minutes`, and returns whether everything is done."""
        self.starts += 1
        end = None if minutes is None else time.perf_counter() + 60 * minutes
        if not (self._autoencoder(end) and all(self._latents(name, end) for name in self.latents)):
            return False
        self._scale = round(1 / float(self.latents["scattered latents"][:4000].float().std()), 4)
        self.parts["vae"].register_to_config(scaling_factor=self._scale)
        if not self._diffusion(end):
            return False
        self.average.copy_to(self._learning())
        save(self.parts, self.out / "painter")
        (self.out / "painter" / "training.json").write_text(json.dumps(self.record(), indent=1) + "\n")
        return True

    def record(self) -> dict:
        """What was trained and how long it took."""
        minutes = {name: round(seconds / 60, 1) for name, seconds in self.seconds.items()}
        return {
            "seed": self.seed,
            "device": self.device,
            "starts": self.starts,
            "minutes": minutes | {"all": round(sum(self.seconds.values()) / 60, 1)},
            "schedule": {"autoencoder": AUTOENCODER, "latents": LATENTS, "diffusion": DIFFUSION},
            "round trip": json.loads((self.out / "round-trip.json").read_text()),
            "machine": self.machine,
        }

    def _autoencoder(self, end: float | None) -> bool:
        vae, size = self.parts["vae"], AUTOENCODER["batch"]
        vae.train()

        def loss(step: int, noise: torch.Generator) -> torch.Tensor:
            pixels, weights = autoencoder.batch(self.seed, step, size)
            return autoencoder.loss(vae, pixels.to(self.device), weights.to(self.device), noise)

        if not self._lesson("autoencoder", AUTOENCODER, [vae], loss, end):
            return False
        vae.eval().requires_grad_(False)
        if not (self.out / "round-trip.json").is_file():
            self._round_trip()
        return True

    def _round_trip(self) -> None:
        """Records how many numbers are still read after encoding and decoding, and shows some of the pictures."""
        trips = autoencoder.round_trip(self.parts["vae"], self.seed, ROUND_TRIPS)
        nano = mg_fast.load("nano")
        truth = [scene.print.text for _, scene, _, _ in trips]
        before, after = (read_numbers(nano, [trip[i] for trip in trips]) for i in (2, 3))
        shapes = [check(back, wished).shapes_right for wished, _, _, back in trips]
        error = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for _, _, a, b in trips]
        result = {
            "pictures": len(trips),
            "numbers read before": round(sum(map(str.__eq__, truth, map(str, before))) / len(trips), 4),
            "numbers read after": round(sum(map(str.__eq__, truth, map(str, after))) / len(trips), 4),
            "shapes and colours right after": round(sum(shapes) / len(trips), 4),
            "mean absolute error of a byte": round(float(np.mean(error)), 2),
        }
        (self.out / "round-trip.json").write_text(json.dumps(result, indent=1) + "\n")
        print(result)
        tiles = [image for trip in trips[:16] for image in trip[2:]]
        _grid(tiles, 8).save(self.out / "samples" / "round-trip.png")

    def _latents(self, name: str, end: float | None) -> bool:
        """Draws and encodes scenes of the second lesson once."""
        file, (count, size) = self.out / f"{name.replace(' ', '-')}.npy", (LATENTS["count"], LATENTS["batch"])
        shape = (count, CHANNELS, LATENT_SIDE, LATENT_SIDE)
        # Without the file, what the state says of it is out of date.
        done = self.steps[name] if file.is_file() else 0
        kept = np.lib.format.open_memmap(file, "r+" if done else "w+", np.float16, shape)
        for first in tqdm(range(done, count, size), desc=name, mininterval=5):
            began = time.perf_counter()
            some = range(first, min(first + size, count))
            drawn = [draw_wish(self.seed, i, scattered=name == "scattered latents")[1] for i in some]
            pixels = autoencoder.to_tensor(np.stack([np.asarray(picture(scene)) for scene in drawn]))
            latents = autoencoder.encode(self.parts["vae"], pixels.to(self.device))
            kept[first : first + size] = latents.cpu().numpy()
            self.steps[name] = first + len(drawn)
            self.seconds[name] += time.perf_counter() - began
            stopped = end is not None and time.perf_counter() > end
            if stopped or (first // size + 1) % KEEP_EVERY == 0 or self.steps[name] == count:
                kept.flush()
                self._keep()
            if stopped:
                return False
        self.latents[name] = torch.from_numpy(kept)
        return True

    def _diffusion(self, end: float | None) -> bool:
        size, count = DIFFUSION["batch"], LATENTS["count"]
        # Both kinds of scenes grant the same wishes.
        wishes = [numbered_wish(self.seed, i) for i in range(count)]
        for name in LEARNS:
            self.parts[name].train()

        def loss(step: int, noise: torch.Generator) -> torch.Tensor:
            rng = random.Random(f"diffusion/{self.seed}/{step}")
            picked = rng.sample(range(count), size)
            # First the parts learn to draw shapes, anywhere, and then to give each of them its own place.
            which = "scattered latents" if step < DIFFUSION["scattered"] else "latents"
            latents = (self.latents[which][picked].float() * self._scale).to(self.device)
            texts = diffusion.prompts([wishes[i] for i in picked], rng)
            return diffusion.loss(self.parts, latents, texts, noise)

        def after(step: int) -> None:
            self.average.step(self._learning())
            if step % SAMPLE_EVERY == 0:
                self._sample(step)

        return self._lesson("diffusion", DIFFUSION, [self.parts[name] for name in LEARNS], loss, end, after)

    def _sample(self, step: int) -> None:
        """Draws the same wishes each time, and says how many of the pictures show what was wished for."""
        rng = random.Random("samples")
        wishes = [random_wish(rng, shapes=1 + i % 3) for i in range(WISHES)]
        self.average.store(self._learning())
        self.average.copy_to(self._learning())
        try:
            drawn = diffusion.sample(self.parts, wishes, seed=0)
        finally:
            self.average.restore(self._learning())
        verdicts = [check(image, wished) for image, wished in zip(drawn, wishes)]
        right = {
            "shapes right": sum(v.shapes_right for v in verdicts) / WISHES,
            "background right": sum(v.background_right for v in verdicts) / WISHES,
            "number right": sum(v.number_right for v in verdicts) / WISHES,
        }
        self._log({"lesson": "samples", "step": step, **right})
        tqdm.write(f"{step}: {right}")
        _grid(drawn, 8).save(self.out / "samples" / f"diffusion-{step:05}.png")

    def _lesson(
        self, name: str, plan: dict, modules: list[torch.nn.Module], loss, end: float | None, after=None
    ) -> bool:
        if self.steps[name] == plan["steps"]:
            return True
        parameters = [parameter for module in modules for parameter in module.parameters()]
        optimizers = make_optimizers(modules, plan["rate"])
        if self._optimizer_states is not None:
            for optimizer, state in zip(optimizers, self._optimizer_states):
                optimizer.load_state_dict(state)
            self._optimizer_states = None
        bar = tqdm(range(self.steps[name], plan["steps"]), desc=name, mininterval=10)
        losses = []
        for step in bar:
            began = time.perf_counter()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["times"] * plan["rate"] * cosine(step, plan["steps"], least=0.01)
            noise = torch.Generator().manual_seed(hash((self.seed, name == "diffusion", step)) % 2**63)
            with autocast(self.device):
                value = loss(step, noise)
            for module in modules:
                module.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(float(value.detach()))
            self.steps[name] = step + 1
            if after is not None:
                after(step + 1)
            self.seconds[name] += time.perf_counter() - began
            if (step + 1) % 50 == 0:
                row = {"lesson": name, "step": step + 1, "loss": round(sum(losses[-50:]) / len(losses[-50:]), 5)}
                self._log(row | {"seconds": round(self.seconds[name], 1)})
                bar.set_postfix(loss=row["loss"])
            stopped = end is not None and time.perf_counter() > end
            if stopped or (step + 1) % KEEP_EVERY == 0:
                # The next lesson has optimizers of its own.
                self._keep(None if step + 1 == plan["steps"] else optimizers)
            if stopped:
                return False
        self._keep()
        return True

    def _learning(self) -> list[torch.nn.Parameter]:
        return [parameter for name in LEARNS for parameter in self.parts[name].parameters()]

    def _log(self, row: dict) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _what(self) -> dict:
        """The settings that must be the same where a run continues."""
        return {"seed": self.seed, "autoencoder": AUTOENCODER, "latents": LATENTS, "diffusion": DIFFUSION}

    def _keep(self, optimizers: Sequence[torch.optim.Optimizer] | None = None) -> None:
        state = {"modules": {name: module.state_dict() for name, module in self.modules.items()}}
        state |= {"average": self.average.state_dict(), "steps": self.steps, "seconds": self.seconds}
        # States that were read and belong to a lesson that has not gone on yet are kept.
        states = self._optimizer_states if optimizers is None else [one.state_dict() for one in optimizers]
        state |= {"optimizers": states}
        state |= {"starts": self.starts, "machine": self.machine, "run": self._what()}
        # The state is first written under another name: a run that is killed while it writes must not lose its state.
        torch.save(state, self.out / "next.pt")
        os.replace(self.out / "next.pt", self.out / "last.pt")

    def _resume(self) -> None:
        state = torch.load(self.out / "last.pt", map_location=self.device, weights_only=True)
        for name, ours in self._what().items():
            if (theirs := state["run"][name]) != ours:
                raise SystemExit(
                    f"{self.out} holds a run with another {name}: "
                    f"give another folder (it has {theirs}, asked for was {ours})"
                )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.average.load_state_dict(state["average"])
        self.steps, self.seconds, self._optimizer_states = state["steps"], state["seconds"], state["optimizers"]
        self.starts, self.machine = state["starts"], state["machine"]


def _grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, one in enumerate(pictures):
        grid.paste(one, (i % columns * width, i // columns * height))
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.nano.train_painter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out", type=Path, help="folder for the pipeline and the log, from which the same command continues"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the scenes (default: 0)")
    parser.add_argument(
        "--minutes", type=float, help="stop after this many minutes; the same command continues from there"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choices = ("cpu", "cuda")
    parser.add_argument("--device", default=device, choices=choices, help="default: a GPU if there is one")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"expected a folder to train in, {args.out} is a file")
    if args.device == "cuda" and device == "cpu":
        parser.error("--device cuda: torch finds no GPU here")
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"expected more than 0 minutes, got --minutes {args.minutes:g}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run = Run(args.out, seed=args.seed, device=args.device)
    try:
        done = run.train(args.minutes)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped: the same command continues from the last full {KEEP_EVERY} steps") from None
    draw_curve(args.out / "log.jsonl", args.out / "loss.png")
    minutes = sum(run.seconds.values()) / 60
    told = f"{args.out / 'painter'} after {minutes:.1f} minutes of training"
    print(told if done else "not done yet: run the same command again")


if __name__ == "__main__":
    main()
