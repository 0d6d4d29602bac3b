"""Builds dialogues that teach a model to write prompts for pictures, from captions and conversations.

python -m recipes.data --out DIR --captions FILE --endpoint http://localhost:8000/v1 --model NAME
python -m recipes.data --out DIR --dialogues FILE --local FOLDER
python -m recipes.data --out DIR --captions FILE     # asks nothing, and writes the files anew from the journal

A detailed caption becomes a short wish with a prompt for SDXL (a re-caption); a conversation gets a prompt for a
picture that fits its last answer (an in-context prompt). DIR/dialogues.json is in LLaVA's format, DIR/report.md counts
everything, DIR/samples.html shows samples, and DIR/rejected.jsonl says why a source was left out. All replies are kept
in DIR/journal.jsonl: the same command goes on after a stop, and does not ask again what was answered. Every command
writes the other files anew, so give it all captions and dialogues.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from mg_fast.errors import MgFastError

from . import build
from .asking import Manners, Tally
from .errors import AskingError, SourceError
from .journal import Journal
from .sources import MOST_TURNS, read_captions, read_dialogues
from .wording import VERSION

# Options of a run that only an endpoint has a use for, with their defaults.
ENDPOINT_ONLY = {"model": None, "key_variable": "OPENAI_API_KEY", "per_minute": None, "timeout": 120.0, "attempts": 6}
MISSING = "{} needs the package {}: pip install 'mg_fast[data]'"
# The exit status of a process that an interrupt has ended.
INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the journal and the results")
    parser.add_argument("--captions", type=Path, action="append", default=[], metavar="FILE", help="detailed captions")
    parser.add_argument("--dialogues", type=Path, action="append", default=[], metavar="FILE", help="conversations")
    parser.add_argument("--turns", type=_whole, default=MOST_TURNS, help=f"most turns of each (default: {MOST_TURNS})")
    parser.add_argument("--most", type=_whole, help="most sources of each kind (default: all)")
    model = parser.add_argument_group("the model that writes")
    where = model.add_mutually_exclusive_group()
    where.add_argument("--endpoint", metavar="ADDRESS", help="base address of an endpoint with OpenAI's protocol")
    where.add_argument("--local", metavar="PATH", help="folder, hub id or .gguf file of a chat model of transformers")
    model.add_argument("--model", metavar="NAME", help="the model's name at the endpoint")
    model.add_argument(
        "--key-variable",
        metavar="NAME",
        help="environment variable with the endpoint's key, if it needs one (default: OPENAI_API_KEY)",
    )
    model.add_argument("--temperature", type=_not_negative, default=0.7, help="default: 0.7")
    model.add_argument("--max-tokens", type=_whole, default=400, help="most tokens of an answer (default: 400)")
    model.add_argument(
        "--parameter",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another field of each request, or null to leave one out; for the endpoint only",
    )
    model.add_argument("--tries", type=_whole, default=build.TRIES, help="answers read for each source (default: 2)")
    manners = parser.add_argument_group("how it is asked")
    manners.add_argument("--at-once", type=_whole, default=8, help="most requests on their way at a time (default: 8)")
    manners.add_argument("--per-minute", type=_positive, help="most requests a minute (default: no limit)")
    manners.add_argument("--timeout", type=_positive, help="seconds in which a whole answer has to come (default: 120)")
    manners.add_argument("--attempts", type=_whole, help="times that a failing request is sent (default: 6)")
    manners.add_argument("--refused-again", action="store_true", help="ask again what the endpoint refused earlier")
    parser.add_argument(
        "--fewer", action="store_true", help="leave out what was answered before and is not among the files this time"
    )
    parser.add_argument(
        "--shown", type=_whole, default=build.SHOWN, help="samples of each kind on the page (default: 20)"
    )
    return parser


def main(words: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(words)
    if not args.captions and not args.dialogues:
        parser.error("expected --captions FILE or --dialogues FILE, got neither")
    for name in ("endpoint", "local"):
        # For instance a variable of the shell that is not set.
        if getattr(args, name) is not None and not getattr(args, name).strip():
            parser.error(f"--{name}: expected an address or a path, got nothing")
    if args.endpoint is not None and not args.model:
        parser.error("--endpoint: expected the model's name there too, --model NAME")
    if args.parameter and args.endpoint is None:
        parser.error("--parameter is for --endpoint")
    if args.refused_again and args.endpoint is None:
        parser.error("--refused-again is for --endpoint")
    if args.key_variable is not None and not os.environ.get(args.key_variable):
        parser.error(f"--key-variable: the environment has no {args.key_variable}, or an empty one")
    for name, default in ENDPOINT_ONLY.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.endpoint is None:
            parser.error(f"--{name.replace('_', '-')} is for --endpoint")
    try:
        status = run(args)
    except MgFastError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted; the replies so far are in the journal\n")
    if status == INTERRUPTED and args.local is not None:
        # A batch of the local model may still be at work in its thread, and nobody waits for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(args: argparse.Namespace) -> int:
    """Runs what the command line asks for.

    Returns:
        The exit status: 1 where a later run has to go on, 130 where a second interrupt has given up requests.

    Raises:
        SourceError: a file of captions or dialogues cannot be read, or sources of earlier runs are missing.
        JournalError: the journal belongs to other settings, is in use, is damaged, or cannot be written.
        AskingError: the local model cannot be loaded, or the endpoint takes no requests.
    """
    read = [read_captions(path) for path in args.captions]
    read += [read_dialogues(path, turns=args.turns) for path in args.dialogues]
    planned = build.plan(read, most=args.most)
    asks = args.endpoint is not None or args.local is not None
    if not asks and not (args.out / build.JOURNAL).is_file():
        raise SourceError(f"{args.out} has no {build.JOURNAL} yet: expected --endpoint or --local, to ask for answers")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"--out: {error}") from None
    tally, error = None, None
    with Journal(args.out / build.JOURNAL, _settings(args) if asks else None) as journal:
        if (missing := build.elsewhere(planned, journal)) and not args.fewer:
            raise SourceError(
                f"{missing} sources that were answered before are not among the captions and dialogues that came now, "
                f"and {build.DIALOGUES} would lose them: give all files again, with the same --turns and --most, or "
                "--fewer to leave them out"
            )
        if asks:
            try:
                tally = asyncio.run(_ask(args, planned, journal))
            except AskingError as caught:
                tally, error = caught.tally, caught
            except KeyboardInterrupt:
                # Where loops take no signals, the interrupt ends the loop itself.
                tally = Tally(stopped=True, cut_off=True)
        counts = build.write(args.out, planned, journal, tally=tally, tries=args.tries, shown=args.shown)
    made, left = sum(counts.made.values()), sum(counts.open.values())
    print(f"{made} dialogues in {args.out / build.DIALOGUES}; {args.out / build.REPORT} tells what became of the rest")
    if error is not None:
        raise error
    if left:
        how = "the same command goes on with them" if asks else "--endpoint or --local asks about them"
        print(f"{left} sources have no good answer yet: {how}")
    if tally is not None and tally.cut_off:
        return INTERRUPTED
    return 1 if left and asks else 0


def _settings(args: argparse.Namespace) -> dict:
    """What the replies depend on."""
    return {
        "model": args.model if args.endpoint is not None else str(args.local),
        "wording": VERSION,
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        **dict(args.parameter),
    }


async def _ask(args: argparse.Namespace, planned: build.Plan, journal: Journal) -> Tally:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise AskingError(MISSING.format("the display of the progress", "tqdm")) from None
    manners = Manners(at_once=args.at_once, per_minute=args.per_minute, attempts=args.attempts)
    with tqdm(total=len(planned.sources), desc="sources", disable=None) as bar:
        async with _asker(args) as asker:
            return await build.ask(
                planned.sources,
                asker,
                journal,
                manners,
                tries=args.tries,
                refused_again=args.refused_again,
                progress=lambda: bar.update(1),
            )


def _asker(args: argparse.Namespace):
    if args.local is not None:
        from .local import LocalModel

        return LocalModel(
            args.local, batch_size=args.at_once, max_new_tokens=args.max_tokens, temperature=args.temperature
        )
    try:
        from .endpoint import Endpoint
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise AskingError(MISSING.format("--endpoint", "httpx")) from None
    fields = {"temperature": args.temperature, "max_tokens": args.max_tokens, **dict(args.parameter)}
    key = os.environ.get(args.key_variable) or None
    return Endpoint(args.endpoint, args.model, key=key, timeout=args.timeout, parameters=fields)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return int(text)


def _positive(text: str) -> float:
    if (value := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _not_negative(text: str) -> float:
    if (value := _number(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number, got {text}")
    return value


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=JSON, got {text}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{name}: expected JSON (a text in quotes), got {value}") from None


if __name__ == "__main__":
    main()
