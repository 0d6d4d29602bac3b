"""Runs the benchmarks that Mini-Gemini was published with, through lmms-eval, and compares with the original's scores.

python -m recipes.evaluate --model YanweiLi/MGM-7B --benchmarks textvqa mme --published 7B
python -m recipes.evaluate --model nano --dtype float32 --tasks nano_scenes
python -m recipes.evaluate --model nano --tasks nano_scenes --dry-run    # prints lmms-eval's command

Everything after -- goes to lmms-eval as it is, for instance `-- --limit 8 --gen_kwargs num_beams=5`. Benchmarks whose
answers a hosted model scores (mmb, mmvet, mathvista) need its key, as lmms-eval's documentation says.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from .tables import BENCHMARKS, ORIGINAL, comparison

TASKS = Path(__file__).parent / "tasks"
ROOT = Path(__file__).parent.parent.parent
MISSING = (
    "lmms-eval is not installed here. Make an environment of its own, and call pip install -c constraints-eval.txt "
    "'.[eval]' in a checkout of mg_fast there"
)
ENTRY_POINTS = "lmms_eval.models"
STALE = (
    f"the installed mg_fast has no entry point {ENTRY_POINTS}, by which lmms-eval finds it, as it was installed at an "
    "earlier state: call pip install -c constraints-eval.txt -e '.[eval]' in the checkout again"
)
# The environment variable with the key of the hosted model that scores answers.
JUDGE_KEY = "OPENAI_API_KEY"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, hub id, or nano")
    parser.add_argument(
        "--benchmarks", nargs="+", default=[], choices=[*BENCHMARKS, "all"], metavar="NAME", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lmms-eval, or of this recipe")
    parser.add_argument("--published", choices=ORIGINAL, help="the published model whose scores are shown beside")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: auto)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
    parser.add_argument("--batch-size", default="16", help="most questions answered at once (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    parser.add_argument("--dry-run", action="store_true", help="print lmms-eval's command and stop")
    parser.add_argument("more", nargs="*", metavar="-- OPTION", help="further options of lmms-eval, after --")
    return parser


def main(words: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(words)
    if not args.benchmarks and not args.tasks:
        parser.error("expected --benchmarks NAME ... or --tasks TASK ..., got neither")
    if "," in args.model:
        # lmms-eval would read what follows as another option.
        parser.error(f"--model: expected a name without a comma, got {args.model}")
    command = lmms_eval_command(args)
    if args.dry_run:
        print(shlex.join(command))
        return
    if importlib.util.find_spec("lmms_eval") is None:
        parser.exit(1, f"{parser.prog}: error: {MISSING}\n")
    if not _is_registered():
        parser.exit(1, f"{parser.prog}: error: {STALE}\n")
    judged = [name for name in _chosen(args) if BENCHMARKS[name].judge]
    if judged and not os.environ.get(JUDGE_KEY):
        print(
            f"{parser.prog}: a hosted model scores the answers of {', '.join(judged)}, and {JUDGE_KEY} is not set",
            file=sys.stderr,
        )
    known = set(args.out.rglob("*_results.json"))
    # The tasks of this recipe import it, wherever the command is called.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    written = sorted(set(args.out.rglob("*_results.json")) - known)
    # lmms-eval ends with 0 where a task has failed, too; then it writes no results.
    if status or not written:
        parser.exit(status or 1, f"{parser.prog}: error: lmms-eval wrote no results\n")
    for file in written:
        print(file)
        found = json.loads(file.read_text(encoding="utf-8"))
        limit = (found.get("config") or {}).get("limit")
        print(comparison(args.published, found["results"], limit=limit), end="")


def lmms_eval_command(args: argparse.Namespace) -> list[str]:
    """The words of lmms-eval's command for the options of this program."""
    tasks = [*(BENCHMARKS[name].task for name in _chosen(args)), *args.tasks]
    options = {"pretrained": args.model, "dtype": args.dtype}
    words = ["--model", "mg_fast", "--model_args", ",".join(f"{name}={value}" for name, value in options.items())]
    words += ["--tasks", ",".join(dict.fromkeys(tasks)), "--include_path", str(TASKS), "--batch_size", args.batch_size]
    words += ["--output_path", str(args.out), "--log_samples"]
    if args.device is not None:
        words += ["--device", args.device]
    return [sys.executable, "-m", "lmms_eval", *words, *args.more]


def _chosen(args: argparse.Namespace) -> list[str]:
    return list(BENCHMARKS) if "all" in args.benchmarks else args.benchmarks


def _is_registered() -> bool:
    """Whether lmms-eval, which gets the checkout as the first folder of its path, finds the model mg_fast."""
    installed = importlib.metadata.distributions(name="mg_fast", path=[str(ROOT), *sys.path])
    # The first of several counts, as for Python itself.
    points = (one for first in [*installed][:1] for one in first.entry_points)
    return any((point.group, point.name) == (ENTRY_POINTS, "mg_fast") for point in points)


if __name__ == "__main__":
    main()
