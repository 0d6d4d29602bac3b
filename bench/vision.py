"""From a picture to image tokens at Mini-Gemini's real sizes, on random weights: the original's steps against ours, in one run.

    python -m bench.vision --save
    python -m bench.vision --hd --runs 2 --dtypes float32

Providers take turns, so that drift hits all of them; the first turn warms up and checks: in every dtype our error against the reference
in the first dtype is at most twice the reference's own in that dtype, plus rounding. The table goes to stderr; the last line of stdout
is one JSON document.
"""

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from mg_fast import use_backend
from mg_fast.meter import Meter
from mg_fast.mini_gemini.configuration import MiniGeminiConfig
from mg_fast.mini_gemini.encoder import PictureEncoder
from mg_fast.mini_gemini.modeling import MiniGeminiModel
from mg_fast.mini_gemini.processing import MiniGeminiImageProcessor

from . import measure

# what a float32 result may differ by, relative to the largest value: tests/tolerances.py
EXACT = 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hd", action="store_true", help="a picture of 1536 pixels: four cells and the global view (default: 768 pixels)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=3, help="timed turns after one that warms up")
    parser.add_argument("--save", action="store_true", help="keep the JSON under bench/results")
    args = parser.parse_args()

    document = run(args)
    measure.finish(document, _table(document), args)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    config = MiniGeminiConfig(image_size_aux=1536 if args.hd else 768, image_grid=1 + args.hd, image_global=args.hd, **SMALL_LANGUAGE_MODEL)
    processor = MiniGeminiImageProcessor.from_config(config)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1365, 2048, 3), np.uint8))
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.device(args.device):
        model = MiniGeminiModel(config).eval()

    providers: dict[str, Callable] = {}
    for name in args.dtypes:
        with torch.inference_mode(False):
            converted = model if name == "float32" else copy.deepcopy(model).to(getattr(torch, name))
            encoder = PictureEncoder(converted)
        providers[f"reference, {name}"] = _reference(converted, processor, picture, args.device)
        providers[f"ours, {name}"] = _ours(encoder, processor, picture, args.device)

    results, times = {}, {name: [] for name in providers}
    for turn in range(args.runs + 1):
        for name, call in providers.items():
            began = time.perf_counter()
            tokens = call()
            _synchronise(args.device)
            times[name].append(time.perf_counter() - began)
            if turn == 0:
                results[name] = tokens.double().cpu()
    first = results[f"reference, {args.dtypes[0]}"]
    errors = {name: ((tokens - first).abs().max() / first.abs().max()).item() for name, tokens in results.items()}

    cases = []
    for name, call in providers.items():
        dtype = name.split(", ")[1]
        rounding = EXACT if dtype == "float32" else 2 * torch.finfo(getattr(torch, dtype)).eps
        stages, whole = Meter(args.device), Meter(args.device)
        call(stages.stage)
        with whole.stage("picture to tokens"):
            call()
        runs = sorted(1e3 * seconds for seconds in times[name][1:])
        cases.append(
            {
                "provider": name,
                "ok": errors[name] <= 2 * errors[f"reference, {dtype}"] + rounding,
                "relative_error": errors[name],
                "first_call_ms": 1e3 * times[name][0],
                "median_ms": statistics.median(runs),
                "p20_ms": runs[len(runs) // 5],
                "p80_ms": runs[-1 - len(runs) // 5],
                "peak_mib": whole.stages[0].peak_mib,
                "stages": [stage._asdict() for stage in stages.stages],
            }
        )
    return {
        "name": f"vision-{'1536-hd' if args.hd else '768'}",
        **measure.environment(),
        "picture": [picture.width, picture.height],
        "runs": args.runs,
        "cases": cases,
    }


# the picture's side is Mini-Gemini's; image tokens are as wide as those of a 7B model, which itself is not run
SMALL_LANGUAGE_MODEL = {
    "model_type": "mgm",
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "vocab_size": 64,
    "mm_projector_type": "mlp2x_gelu",
}


def _reference(model: MiniGeminiModel, processor: MiniGeminiImageProcessor, picture: Image.Image, device: str) -> Callable:
    def call(stage: Callable | None = None) -> torch.Tensor:
        with use_backend("reference"):
            with _stage(stage, "preprocess"):
                pixels = processor(picture).to(device)
            return model.get_image_features(**pixels, **({"stage": stage} if stage else {})).pooler_output

    return call


def _ours(encoder: PictureEncoder, processor: MiniGeminiImageProcessor, picture: Image.Image, device: str) -> Callable:
    def call(stage: Callable | None = None) -> torch.Tensor:
        with _stage(stage, "preprocess"):
            # as the pipeline: on a CPU Pillow
            pixels = processor(picture, device=device if device == "cuda" else None).to(device)
        return encoder(**pixels, stage=stage)

    return call


def _stage(stage: Callable | None, name: str):
    return stage(name) if stage else contextlib.nullcontext()


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _table(document: dict) -> str:
    cases = {case["provider"]: case for case in document["cases"]}
    baseline = document["cases"][0]
    lines = [f"{document['name']}, {document['gpu'] or document['cpu']}, {document['threads']} threads"]
    lines.append(f"{'provider':<22} {'median ms':>10} {'p20..p80':>18} {'same dtype':>11} {'first':>7} {'peak MiB':>9} {'error':>8}")
    for name, case in cases.items():
        same = cases[f"reference, {name.split(', ')[1]}"]
        spread = f"{case['p20_ms']:.0f}..{case['p80_ms']:.0f}"
        ratios = [f"{other['median_ms'] / case['median_ms']:.2f}x" if case["ok"] else "FAIL" for other in (same, baseline)]
        peak = "unknown" if case["peak_mib"] is None else f"{case['peak_mib']:.0f}"
        lines.append(
            f"{name:<22} {case['median_ms']:>10.0f} {spread:>18} {ratios[0]:>11} {ratios[1]:>7} {peak:>9} {case['relative_error']:>8.1e}"
        )
        lines += [f"    {stage['name']:<22} {1e3 * stage['seconds']:>8.0f} ms" for stage in case["stages"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
