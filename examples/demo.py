"""The whole pipeline on a real photograph: `make demo`.

Builds (once, seeded, in the user's cache folder) a small random Mini-Gemini checkpoint in the published layout, shows it a photograph and
prints what each stage costs. The weights are random, so the answer is noise: what is real is every step from the JPEG to the text.
"""

import os
import time
from pathlib import Path

import torch
from matplotlib import cbook
from PIL import Image
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.meter import format_stages

from .random_checkpoint import build

# raise when what `build` writes changes, so that nobody runs yesterday's folder
VERSION = 1
QUESTION = "What is in the picture?"


def checkpoint_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mg_fast" / f"demo-v{VERSION}"
    if not (cache / "tokenizer_config.json").is_file():
        print(f"building a small random checkpoint in {cache} (once)")
        # written last by build(), so a broken-off build is never taken for a whole one
        build(cache, size="demo", seed=0)
    return cache


def main() -> None:
    transformers_logging.set_verbosity_error()
    # Grace Hopper, photographed by James S. Davis, US Navy: public domain, shipped with matplotlib
    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    folder = checkpoint_folder()
    pipeline = mg_fast.load(folder, template="vicuna_v1", image_cache_bytes=0)
    config = pipeline.model.config
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    print(f"loaded {parameters / 1e6:.1f} M random parameters in {pipeline.load_seconds:.1f} s on {pipeline.device}")

    with Image.open(photo) as image:
        size = f"{image.width}x{image.height}"
    grid = int(config.tokens_per_view**0.5)
    print(f"photograph {Path(photo).name}, {size}")
    print(f"  -> padded and resized to {config.image_size_aux}x{config.image_size_aux} for the high-resolution ConvNeXt")
    print(f"  -> shrunk to {config.vision_config.image_size}x{config.vision_config.image_size} for the low-resolution CLIP")
    print(f"  -> {grid}x{grid} queries, each mines its own 8x8 window of the pyramid -> {config.tokens_per_picture} image tokens")

    pipeline.chat(QUESTION, [photo], max_new_tokens=2)  # first use of every operation, so that the table shows the second
    pipeline.reset()
    began = time.perf_counter()
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=24, profile=True)
    seconds = time.perf_counter() - began

    print(f"\nquestion: {QUESTION}")
    print(f"answer:   {answer.text!r}")
    print("          (noise: the weights are RANDOM; a published Mini-Gemini checkpoint answers in earnest)\n")
    print(format_stages(answer.stages))
    print(
        f"\n{answer.prompt_tokens} prompt tokens ({answer.image_tokens} of them image), {len(answer.token_ids)} new, {seconds:.2f} s in all"
    )
    print(f"{pipeline.model.dtype}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
