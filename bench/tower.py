"""The high-resolution tower on random weights of the published size: timm's modules in NCHW against ours, in one run.

    python -m bench.tower --side 768 --save
    python -m bench.tower --side 1536 --dtypes float32 bfloat16 float16 --runs 1

Every stage map is held against float64 by the tests' accuracy rule before anything is timed; providers take turns, so that drift hits all
of them. The table goes to stderr; the last line of stdout is one JSON document.
"""

import argparse
import copy
import statistics
import sys
import time

import torch

from mg_fast.meter import Meter
from mg_fast.mini_gemini.configuration import CONVNEXT_LARGE
from mg_fast.modules import ConvNeXtPyramid
from tests.tolerances import assert_accurate, errors

from . import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=768, help="pixels")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=5, help="timed turns after the one that checks")
    parser.add_argument("--save", action="store_true", help="keep the JSON under bench/results")
    args = parser.parse_args()

    document = run(args)
    measure.finish(document, _table(document), args)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    tower = ConvNeXtPyramid.from_dims(**CONVNEXT_LARGE).to(args.device)
    for name, p in tower.named_parameters():
        if name.endswith("gamma"):
            # timm begins with layer scales of one in a million, under which the blocks would do nothing
            p.uniform_(0.1, 0.5)
    pixels = torch.randn(1, 3, args.side, args.side, device=args.device)
    oracle = copy.deepcopy(tower).double()(pixels.double(), backend="reference")

    providers = {}
    for name in args.dtypes:
        dtype = getattr(torch, name)
        converted, given = copy.deepcopy(tower).to(dtype), pixels.to(dtype)
        packed = converted.pack()
        providers[f"timm, {name}"] = lambda tower=converted, given=given: tower(given, backend="reference")
        providers[f"ours, {name}"] = lambda packed=packed, given=given: packed(given)

    cases, plain = [], {}
    for name, call in providers.items():
        dtype = name.split(", ")[1]
        began = time.perf_counter()
        maps = call()
        first = time.perf_counter() - began
        plain.setdefault(dtype, maps)
        try:
            for level, expected, exact in zip(maps, plain[dtype], oracle, strict=True):
                assert_accurate(level, expected, exact)
            ok = True
        except AssertionError as error:
            print(f"FAIL {name}: {error}", file=sys.stderr)
            ok = False
        worst = max(errors(level, exact)[0] for level, exact in zip(maps, oracle, strict=True))
        cases.append({"provider": name, "ok": ok, "relative_error": worst, "first_call_ms": 1e3 * first, "runs_ms": []})
    del oracle, plain, maps
    for _ in range(args.runs):
        for case in cases:
            began = time.perf_counter()
            providers[case["provider"]]()
            if args.device == "cuda":
                torch.cuda.synchronize()
            case["runs_ms"].append(1e3 * (time.perf_counter() - began))
    for case in cases:
        runs = sorted(case.pop("runs_ms"))
        case["median_ms"], case["p20_ms"], case["p80_ms"] = statistics.median(runs), runs[len(runs) // 5], runs[-1 - len(runs) // 5]
        meter = Meter(args.device)
        with meter.stage("tower"):
            maps = providers[case["provider"]]()
        held = sum(level.nbytes for level in maps) / 2**20
        # above the stage maps themselves
        case["peak_mib"] = None if meter.stages[0].peak_mib is None else meter.stages[0].peak_mib - held
        del maps
    return {"name": f"tower-{args.side}", **measure.environment(), "pixels": list(pixels.shape), "runs": args.runs, "cases": cases}


def _table(document: dict) -> str:
    cases = {case["provider"]: case for case in document["cases"]}
    lines = [f"{document['name']}, {document['gpu'] or document['cpu']}, {document['threads']} threads"]
    lines.append(f"{'provider':<18} {'median ms':>10} {'p20..p80':>16} {'speedup':>8} {'peak MiB above the maps':>24} {'error':>8}")
    for name, case in cases.items():
        speedup = cases[f"timm, {name.split(', ')[1]}"]["median_ms"] / case["median_ms"]
        peak = "unknown" if case["peak_mib"] is None else f"{case['peak_mib']:.0f}"
        spread, shown = f"{case['p20_ms']:.0f}..{case['p80_ms']:.0f}", f"{speedup:.2f}x" if case["ok"] else "FAIL"
        lines.append(f"{name:<18} {case['median_ms']:>10.0f} {spread:>16} {shown:>8} {peak:>24} {case['relative_error']:>8.1e}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
