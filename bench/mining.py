"""Patch info mining at Mini-Gemini's real sizes: every backend that runs here against the original's steps, in one run.

    python -m bench.mining --save
    python -m bench.mining --hd --dtype bfloat16 --runs 10

Providers take turns, so that drift hits all of them; accuracy is checked before anything is timed, by the tests' rule. The table goes to
stderr; the last line of stdout is one JSON document.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch

from mg_fast import backend as backends
from mg_fast.meter import Meter
from mg_fast.modules import PatchInfoMining
from tests.tolerances import assert_accurate

from . import measure

DIMS = (192, 384, 768, 1536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hd", action="store_true", help="a picture of 1536 pixels: four cells and the global view (default: 768 pixels)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--patches", type=int, default=24, help="queries along a side: 24 is Mini-Gemini's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also the torch backend under torch.compile")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each provider, a third of it of the reference")
    parser.add_argument("--save", action="store_true", help="keep the JSON under bench/results")
    args = parser.parse_args()

    document = run(args)
    measure.finish(document, _table(document), args)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    grid, views = (2, 5) if args.hd else (1, 1)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    torch.manual_seed(0)
    mining = PatchInfoMining(1024, DIMS, dtype=dtype, device=device)
    fine = args.patches * 8 * grid
    queries = torch.randn(args.batch, views, args.patches**2, 1024, dtype=dtype, device=device)
    pyramid = [torch.randn(args.batch, fine >> s, fine >> s, c, dtype=dtype, device=device) for s, c in enumerate(DIMS)]

    def provider(backend: str, compiled: bool = False) -> Callable[[], torch.Tensor]:
        call = torch.compile(mining, dynamic=False) if compiled else mining
        return lambda: call(queries, pyramid, grid=grid, backend=backend)

    names = [name for name in backends.IMPLEMENTED["patch_mining"] if backends.why_not("patch_mining", name, device) is None]
    providers = {name: provider(name) for name in names}
    if args.compile:
        providers["torch, compiled"] = provider("torch", compiled=True)

    oracle = copy.deepcopy(mining).double()(queries.double(), [p.double() for p in pyramid], grid=grid, backend="reference")
    cases, plain = [], None
    for name, call in providers.items():
        began = time.perf_counter()
        out = call()
        first = time.perf_counter() - began
        # the reference comes first
        plain = out if plain is None else plain
        try:
            assert_accurate(out, plain, oracle)
            ok = True
        except AssertionError as error:
            print(f"FAIL {name}: {error}", file=sys.stderr)
            ok = False
        error = ((out.double() - oracle).abs().max() / oracle.abs().max()).item()
        cases.append({"provider": name, "ok": ok, "relative_error": error, "first_call_ms": first * 1e3, "runs_ms": []})
    del oracle, out
    for turn in range(args.runs + 1):
        for case in cases:
            if case["provider"] != "reference" or turn % 3 == 0:
                case["runs_ms"].append(_time(providers[case["provider"]], device))
    for case in cases:
        # the first turn warms up
        times = sorted(case.pop("runs_ms")[1:])
        case["median_ms"] = statistics.median(times)
        case["p20_ms"], case["p80_ms"] = times[len(times) // 5], times[-1 - len(times) // 5]
        case["peak_mib"] = _peak(providers[case["provider"]], device)
    return {
        "name": f"mining-{'1536-hd' if args.hd else '768'}-{args.dtype}" + f"-b{args.batch}" * (args.batch > 1),
        **measure.environment(),
        "queries": list(queries.shape),
        "pyramid": [list(level.shape) for level in pyramid],
        "runs": args.runs,
        "cases": cases,
    }


def _time(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def _peak(call: Callable[[], torch.Tensor], device: torch.device) -> float | None:
    """MiB above inputs and weights."""
    meter = Meter(device)
    with meter.stage("mining"):
        call()
    return meter.stages[0].peak_mib


def _table(document: dict) -> str:
    reference = document["cases"][0]
    lines = [f"{document['name']}, {document['gpu'] or document['cpu']}, {document['threads']} threads"]
    lines.append(f"{'provider':<16} {'median ms':>10} {'p20..p80':>18} {'speedup':>8} {'peak MiB':>9} {'error':>9}")
    for case in document["cases"]:
        speedup = f"{reference['median_ms'] / case['median_ms']:.1f}x" if case["ok"] else "FAIL"
        peak = "unknown" if case["peak_mib"] is None else f"{case['peak_mib']:.0f}"
        spread = f"{case['p20_ms']:.1f}..{case['p80_ms']:.1f}"
        lines.append(
            f"{case['provider']:<16} {case['median_ms']:>10.1f} {spread:>18} {speedup:>8} {peak:>9} {case['relative_error']:>9.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
