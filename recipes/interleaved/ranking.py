"""Ranks candidate answers to the last question of a dialog about a picture, the likeliest first.

python -m recipes.interleaved.ranking --model DIR photo.jpg "a cat on a chair" "is it red" --option yes --option no
"""

import argparse
from pathlib import Path

from mg_fast.models.mm_interleaved.prompts import dialog

from . import common


def rank(pipeline, picture, caption: str, turns: list[tuple[str, str]], question: str, options: list[str]) -> list:
    """The options with their scores, the likeliest first. A score is the sum of the tokens' log-probabilities."""
    scores = pipeline.conversation().score(dialog(picture, caption, turns, question), options)
    return sorted(zip(options, scores), key=lambda scored: -scored[1])


def main() -> None:
    parser = common.make_parser("ranking", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture")
    parser.add_argument("caption", metavar="CAPTION", help="its caption, without a full stop")
    parser.add_argument("question", metavar="QUESTION", help="the last question, without a question mark")
    parser.add_argument(
        "--turn",
        nargs=2,
        action="append",
        default=[],
        metavar=("QUESTION", "ANSWER"),
        help="an earlier turn; repeatable",
    )
    parser.add_argument("--option", action="append", required=True, metavar="TEXT", help="an answer; at least two")

    def action(args: argparse.Namespace) -> None:
        [picture] = common.pictures([args.file])
        turns = [tuple(turn) for turn in args.turn]
        for option, score in rank(common.load(args), picture, args.caption, turns, args.question, args.option):
            print(f"{score:9.3f}  {option}")

    common.run(parser, action)


if __name__ == "__main__":
    main()
