"""Answers questions about one picture, each in a word or two.

python -m recipes.interleaved.questions --model DIR photo.jpg "What is on the table?" "How many people are there?"
"""

import argparse
from pathlib import Path

from mg_fast.models.mm_interleaved.prompts import question

from . import common


def answers(pipeline, picture, questions: list[str], *, may_be_unanswerable: bool = False) -> list[str]:
    """The answer to each question, with the original's prompt and beams. The questions do not know of each other."""
    return [
        pipeline.conversation()
        .chat(question(picture, asked, may_be_unanswerable=may_be_unanswerable), task="question")
        .text
        for asked in questions
    ]


def main() -> None:
    parser = common.make_parser("questions", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument(
        "--unanswerable", action="store_true", help="let the model say that the picture does not tell, as for VizWiz"
    )

    def action(args: argparse.Namespace) -> None:
        [picture] = common.pictures([args.file])
        pipeline = common.load(args)
        for answer in answers(pipeline, picture, args.questions, may_be_unanswerable=args.unanswerable):
            print(answer)

    common.run(parser, action)


if __name__ == "__main__":
    main()
