"""mg-fast chat: a conversation about pictures in the terminal."""

import argparse
import importlib.util
import os
import sys

from ..errors import BackendError, CheckpointError, DrawingError, PictureError, PromptError, shortened
from . import drawing, loading
from .options import answer_options, model_options, picture_file, sampling_options
from .streams import print_stream

# Errors that belong to one question, or to one command, after which the conversation goes on.
_OF_THIS_QUESTION = (PictureError, PromptError, DrawingError, CheckpointError, BackendError, FloatingPointError)

CHAT_HELP = """\
/image FILE   add a picture to the next question (repeat to add more)
/draw TEXT    ask for a picture
/painter P    draw with another text-to-image pipeline
/save FILE    save the last picture
/reset        forget the conversation
/help         show this list
/quit         leave (also Ctrl-D)"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        parents=[
            model_options(),
            answer_options(),
            sampling_options(),
            drawing.drawing_options(),
        ],
        help="talk about pictures in the terminal",
        description="Loads a model and answers the questions that are typed in the terminal, as one conversation.",
        epilog=f"commands within the conversation:\n{CHAT_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ocr", action="store_true", help="read the text in new pictures first, as a hint (needs the extra `ocr`)"
    )
    parser.set_defaults(action=command)


def command(args) -> int:
    pipeline = loading.load_to_answer(args, painter=drawing.load_painter(args))
    conversation = pipeline.conversation()
    import torch

    if sys.stdin.isatty():
        # Where Python has readline, importing it gives the prompt line editing and a history.
        if importlib.util.find_spec("readline"):
            import readline  # noqa: F401
        print(CHAT_HELP)
    images: list = []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return 0
        word, _, rest = line.partition(" ")
        turns = len(getattr(conversation, "turns", ()))
        try:
            if not line:
                continue
            if word in ("/quit", "/exit"):
                return 0
            if word == "/help":
                print(CHAT_HELP)
            elif word == "/reset":
                conversation.reset()
                images = []
                print("(conversation forgotten)")
            elif word == "/image":
                images.append(_checked_picture(pipeline, rest.strip().strip("'\"")))
                print(f"({len(images)} picture{'s' if len(images) > 1 else ''} with the next question)")
            elif word == "/painter":
                if loading.is_interleaved(args.model):
                    raise DrawingError("/painter: this model draws by itself")
                if not rest.strip():
                    raise DrawingError("/painter needs a folder, a hub id or nano: /painter P")
                conversation.painter = drawing.load_painter(args, rest.strip().strip("'\""))
                print(f"(draws with {conversation.painter.name})")
            elif word == "/save":
                print(f"({_saved(conversation, rest.strip(), args)})")
            elif word == "/draw":
                if not rest.strip():
                    raise PromptError("/draw needs a text: /draw TEXT")
                print("model> ", end="", flush=True)
                _draw(conversation, rest.strip(), images, args)
                images = []
            elif word.startswith("/"):
                print(f"unknown command {shortened(word, 80)}\n{CHAT_HELP}")
            else:
                print("model> ", end="", flush=True)
                print_stream(conversation.chat(line, images, stream=True, **loading.sampling(args), **_hints(args)))
                images = []
        except KeyboardInterrupt:
            # Ctrl-C stops the answer, not the conversation. An answer that is complete is kept before it is drawn.
            kept = len(getattr(conversation, "turns", ())) > turns
            print(f"\n(interrupted; {'the text is kept, without a picture' if kept else 'this turn is not kept'})")
        except (*_OF_THIS_QUESTION, torch.OutOfMemoryError) as error:
            # These errors belong to this question alone, and the next one may well be answered.
            print(f"{error}")


def _hints(args) -> dict[str, bool]:
    """The arguments of `chat` for what is read in the pictures first."""
    return {"ocr": True} if args.ocr else {}


def _draw(conversation, text: str, images: list, args) -> None:
    """Asks for a picture, and saves it when it is drawn."""
    if loading.is_interleaved(args.model):
        # This model draws what follows by itself.
        with drawing.progress() as on_step:
            found = conversation.draw([*images, *([text] if text else [])], **drawing.of_own_picture(args, on_step))
        for file in drawing.save(found, args):
            print(f"({file})")
        return
    with drawing.progress() as on_step:
        options = drawing.of_each_picture(args) | {"on_step": on_step}
        stream = conversation.chat(text, images, stream=True, draw=options, **loading.sampling(args), **_hints(args))
        print_stream(stream)
    for file in drawing.save(stream.images, args):
        print(f"({file})")
    if stream.no_image_reason:
        print(f"(no picture: {stream.no_image_reason})")


def _saved(conversation, file: str, args) -> str:
    if getattr(conversation, "last_drawn", None) is None:
        raise DrawingError("/save: no picture has been drawn yet")
    try:
        name = picture_file(file)
    except argparse.ArgumentTypeError as error:
        raise DrawingError(f"/save: {error}") from None
    if os.path.exists(name) and not args.force:
        raise DrawingError(f"/save: {name} exists")
    drawing.write(conversation.last_drawn, name)
    return name


def _checked_picture(pipeline, file: str):
    from ..models.pictures import open_picture

    if not file:
        raise PictureError("/image needs a file: /image FILE")
    # The picture is decoded and processed once now. If its fault showed only with the question, the picture would
    # still be waiting, and every later question would fail as well.
    image = open_picture(file)
    pipeline.processor.image_processor(image)
    return image
