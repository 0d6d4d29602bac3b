"""mg-fast explain: draws a heat map of the mined pixels over the picture."""

import sys

from ..errors import CheckpointError, PromptError
from ..runtime.arguments import check_text
from . import loading
from .options import answer_options, model_options, picture_file


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "explain",
        parents=[model_options(), answer_options()],
        help="draw a heat map over a picture: where the model looked closely",
        description="Draws a heat map over a picture. It shows which high-resolution pixels the model mined for its "
        "image tokens and, with a question, which of them the answer depends on.",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="a question: show which pixels its answer depends on (default: all image tokens count alike)",
    )
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument(
        "--out",
        required=True,
        type=picture_file,
        metavar="FILE",
        help="where to write the drawing: a .png, .jpg or .webp file",
    )
    parser.add_argument("--allow-urls", action="store_true", help="fetch the picture if it is given as a URL")
    parser.add_argument(
        "--windows", action="store_true", help="also draw the borders of the windows: one for each image token"
    )
    parser.set_defaults(action=command)


def command(args) -> int:
    if args.prompt is not None and not args.prompt.strip():
        raise PromptError("--prompt is empty: give a question, or leave --prompt out to weigh all image tokens alike")
    check_text(args.prompt or "", "--prompt")
    [picture] = loading.open_pictures(args, [args.image])
    if loading.is_interleaved(args.model):
        raise CheckpointError(
            f"{args.model} is MM-Interleaved, which cannot be explained: a heat map shows the pixels that Mini-Gemini "
            "mines for its image tokens, and this model has no such step"
        )
    pipeline = loading.load_to_answer(args)
    explanation = pipeline.explain(picture, args.prompt, max_new_tokens=args.max_new_tokens, windows=args.windows)
    explanation.image.save(args.out)
    if explanation.answer is not None:
        print(explanation.answer.text)
    print(f"drawn to {args.out}", file=sys.stderr)
    return 0
