"""One picture through the whole model, stage by stage, on random weights of a published size.

    python -m bench.end_to_end --size 2b --dtype bfloat16 --folder /tmp/mgm-2b --backend reference --save

Weights' values do not change the work, so random ones give the published models' times. The table goes to stderr; the last line of
stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib import cbook
from transformers.utils import logging as transformers_logging

import mg_fast
from examples.random_checkpoint import SIZES, build
from mg_fast.meter import Stage, format_stages

from . import records

QUESTION = "Describe the picture in detail: what is shown, what colours are there, and is anything written in it?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--hd", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--backend", choices=("auto", "reference", "torch", "triton"), default="auto")
    parser.add_argument("--device")
    parser.add_argument("--folder", help="keep the checkpoint here, and use it if it is there (default: a temporary folder)")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="timed runs after one that warms up; the medians are reported")
    parser.add_argument("--save", action="store_true", help="keep the JSON under bench/results")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        built_s = None
        if not (folder / "tokenizer_config.json").is_file():
            began = time.perf_counter()
            build(folder, size=args.size, hd=args.hd, dtype=getattr(torch, args.dtype))
            built_s = time.perf_counter() - began
        pipeline = mg_fast.load(folder, device=args.device, backend=args.backend, image_cache_bytes=0)
        document = run(pipeline, args)
    document["built_s"] = built_s
    print(f"{document['name']}: loaded in {document['load_s']:.1f} s, first answer {document['first_answer_s']:.1f} s", file=sys.stderr)
    print(format_stages([Stage(**stage) for stage in document["stages"]]), file=sys.stderr)
    if args.save:
        device = (document["gpu"] or "cpu").lower().replace(" ", "-")
        records.write(records.RESULTS / f"end-to-end-{document['name']}-{device}.json", document)
    print(json.dumps(document))


def run(pipeline: mg_fast.Pipeline, args: argparse.Namespace) -> dict:
    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    answers, seconds = [], []
    for _ in range(args.runs + 1):
        pipeline.reset()
        began = time.perf_counter()
        answers.append(pipeline.chat(QUESTION, [photo], max_new_tokens=args.new_tokens, profile=True))
        seconds.append(time.perf_counter() - began)
    timed = answers[1:]
    stages = []
    for i, stage in enumerate(timed[0].stages):
        peaks = [answer.stages[i].peak_mib for answer in timed]
        peak = None if None in peaks else statistics.median(peaks)
        stages.append({"name": stage.name, "seconds": statistics.median(a.stages[i].seconds for a in timed), "peak_mib": peak})
    return {
        "name": f"{args.size}{'-hd' if args.hd else ''}-{args.dtype}-{args.backend}",
        **records.environment(),
        "parameters": sum(p.numel() for p in pipeline.model.parameters()),
        "runs": args.runs,
        "load_s": pipeline.load_seconds,
        "first_answer_s": seconds[0],
        "answer_s": statistics.median(seconds[1:]),
        "prompt_tokens": timed[0].prompt_tokens,
        "image_tokens": timed[0].image_tokens,
        "new_tokens": len(timed[0].token_ids),
        "stages": stages,
    }


if __name__ == "__main__":
    main()
