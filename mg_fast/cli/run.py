"""mg-fast run: answers one question."""

import json
import sys
import time

from ..errors import PromptError
from ..runtime.arguments import check_text
from . import drawing, loading
from .options import answer_options, model_options, sampling_options
from .streams import first_use_lines, print_stream


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "run",
        parents=[
            model_options(),
            answer_options(),
            sampling_options(),
            drawing.drawing_options(),
        ],
        help="answer one question",
        description="Answers one question, with or without pictures.",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture file; may be given several times"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--draw", action="store_true", help="ask for a picture, and draw it with --painter; its file is printed last"
    )
    parser.add_argument(
        "--ocr", action="store_true", help="read the text in the pictures first, as a hint (needs the extra `ocr`)"
    )
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures that are given as URLs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--profile", action="store_true", help="show time and memory of every stage")
    parser.set_defaults(action=command)


def command(args) -> int:
    if not args.prompt.strip():
        raise PromptError("--prompt is empty: expected a question")
    check_text(args.prompt, "--prompt")
    if args.draw:
        if args.painter is None:
            raise PromptError("--draw needs a painter: --painter P")
        drawing.check_free(args)
    elif args.painter is not None:
        raise PromptError("--painter draws what --draw asks for: add --draw")
    pictures = loading.open_pictures(args, args.image)
    # A painter loads its weights when it draws; what is wrong with its folder shows here.
    pipeline = loading.load_to_answer(args, painter=drawing.load_painter(args) if args.draw else None)
    began = time.perf_counter()
    with drawing.progress() as on_step:
        options = loading.sampling(args) | ({"ocr": True} if args.ocr else {})
        if args.draw:
            options["draw"] = drawing.of_each_picture(args) | {"on_step": on_step}
        if args.json or args.profile:
            answer = pipeline.chat(args.prompt, pictures, profile=args.profile, **options)
        else:
            stream = pipeline.chat(args.prompt, pictures, stream=True, **options)
            print_stream(stream)
            answer = stream.answer
    files = drawing.save(answer.images, args)
    seconds = time.perf_counter() - began
    if args.json:
        print(json.dumps(_document(pipeline, answer, files, seconds, profile=args.profile)))
    elif args.profile:
        from ..runtime.meter import format_stages

        print(answer.text)
        print(first_use_lines(pipeline.first_use), file=sys.stderr)
        print(format_stages(answer.stages), file=sys.stderr)
    if not args.json:
        for file in files:
            print(file)
    if args.draw and answer.no_image_reason:
        print(f"mg-fast: no picture: {answer.no_image_reason}", file=sys.stderr)
    return 0


def _document(pipeline, answer, files: list[str], seconds: float, *, profile: bool) -> dict:
    """The object that --json prints."""
    from ..engine.answers import NOT_ASKED

    document = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "cached_tokens": answer.cached_tokens,
        "new_tokens": len(answer.token_ids),
        "weight_bytes": {"language_model": pipeline.weights.language_model, "vision": pipeline.weights.vision},
        "load_s": round(pipeline.load_seconds, 3),
        "answer_s": round(seconds, 3),
    }
    if files or answer.no_image_reason != NOT_ASKED:
        document["image_prompts"] = answer.image_prompts
        document["image_files"] = files
        document["no_image_reason"] = answer.no_image_reason
    if profile:
        document["stages"] = [stage._asdict() for stage in answer.stages]
        document["first_use_s"] = {what: round(s, 3) for what, s in pipeline.first_use.items()}
    return document
