"""mg-fast chat: a conversation about pictures in the terminal."""

import argparse
import importlib.util
import sys

from ..errors import PictureError, PromptError, shortened
from . import loading
from .options import answer_options, model_options, sampling_options
from .streams import print_stream

CHAT_HELP = """\
/image FILE   add a picture to the next question (repeat to add more)
/reset        forget the conversation
/help         show this list
/quit         leave (also Ctrl-D)"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        parents=[model_options(), answer_options(), sampling_options()],
        help="talk about pictures in the terminal",
        description="Loads a model and answers the questions that are typed in the terminal, as one conversation.",
        epilog=f"commands within the conversation:\n{CHAT_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(action=command)


def command(args) -> int:
    pipeline = loading.load_to_answer(args)
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
            elif word.startswith("/"):
                print(f"unknown command {shortened(word, 80)}\n{CHAT_HELP}")
            else:
                print("model> ", end="", flush=True)
                print_stream(conversation.chat(line, images, stream=True, **loading.sampling(args)))
                images = []
        except KeyboardInterrupt:
            # Ctrl-C stops the answer, not the conversation.
            print("\n(interrupted; this turn is not kept)")
        except (PictureError, PromptError, FloatingPointError, torch.OutOfMemoryError) as error:
            # These errors belong to this question alone, and the next one may well be answered.
            print(f"{error}")


def _checked_picture(pipeline, file: str):
    from ..models.pictures import open_picture

    if not file:
        raise PictureError("/image needs a file: /image FILE")
    # The picture is decoded and processed once now. If its fault showed only with the question, the picture would
    # still be waiting, and every later question would fail as well.
    image = open_picture(file)
    pipeline.processor.image_processor(image)
    return image
