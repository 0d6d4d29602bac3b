"""Answers a question after some examples. Each example is a picture, a question and its answer.

python -m recipes.interleaved.few_shot --model DIR photo.jpg "How many birds are there?" \\
    --example boat.jpg "Is the boat red?" yes --example tree.jpg "How many trees are there?" 3
"""

import argparse
from pathlib import Path

from mg_fast.models.mm_interleaved.prompts import few_shot

from . import common


def answer(pipeline, examples: list[tuple], picture, question: str) -> str:
    """The answer, with the original's prompt and beams. A picture of an example may be None."""
    return pipeline.conversation().chat(few_shot(examples, picture, question), task="question").text


def main() -> None:
    parser = common.make_parser("few_shot", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture of the question")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--example", nargs=3, action="append", required=True, metavar=("FILE", "QUESTION", "ANSWER"), help="repeatable"
    )

    def action(args: argparse.Namespace) -> None:
        [picture, *shown] = common.pictures([args.file, *(Path(file) for file, _, _ in args.example)])
        examples = [(seen, asked, told) for seen, (_, asked, told) in zip(shown, args.example)]
        print(answer(common.load(args), examples, picture, args.question))

    common.run(parser, action)


if __name__ == "__main__":
    main()
