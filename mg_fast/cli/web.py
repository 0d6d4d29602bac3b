"""mg-fast web: a page in the browser for conversations about pictures."""

import argparse
import sys

from ..errors import BackendError, CheckpointError
from . import drawing, loading
from .options import model_options, positive


def register(subparsers) -> None:
    from ..web.limits import NAMES, Limits

    parser = subparsers.add_parser(
        "web",
        parents=[model_options(default="nano"), drawing.painter_options()],
        help="show a page for conversations about pictures",
        description="Shows a web page (extra `ui`) on which many users at once can ask about pictures, see the answers "
        "being written, draw, and see what the model looked at. Nothing that they send is kept.",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="where to listen (default: this machine only)")
    parser.add_argument("--port", type=_port, default=7860, metavar="N", help="port (default: 7860); 0: a free one")
    defaults = Limits()
    told = ", ".join(f"{name}={getattr(defaults, name)}" for name in NAMES)
    parser.add_argument(
        "--share-limit",
        action="append",
        default=[],
        type=_limit,
        metavar="NAME=NUMBER",
        help=f"a limit of what is shared by the users; may be given several times (defaults: {told})",
    )
    parser.add_argument("--auth", metavar="FILE", help="ask for a name and a password; FILE has lines name:password")
    parser.add_argument(
        "--root-path",
        default="",
        type=_root_path,
        metavar="PATH",
        help="where a proxy shows the page, such as https://pictures.example or /pictures",
    )
    parser.add_argument(
        "--hosts",
        nargs="+",
        default=[],
        type=_host,
        metavar="NAME",
        help="further names by which the page is reached; requests for unknown names are refused (known are localhost, "
        "addresses, --host, the host of --root-path, and this machine's name where --host lets others in)",
    )
    parser.add_argument(
        "--allow-urls", action="store_true", help="fetch pictures by their URLs, from public addresses only"
    )
    parser.add_argument(
        "--drain-seconds",
        type=positive,
        default=60,
        metavar="N",
        help="at SIGTERM, let running answers end for so long (default: 60)",
    )
    parser.add_argument("--allow-long", action="store_true", help="accept prompts longer than the model was trained on")
    parser.set_defaults(action=command)


def command(args) -> int:
    from ..web.accounts import Accounts
    from ..web.limits import limits_of
    from ..web.requirements import why_not

    # What is wrong with the environment or the options is found before the model is loaded.
    if (reason := why_not()) is not None:
        raise BackendError(reason)
    accounts = Accounts.read(args.auth) if args.auth is not None else None
    limits = limits_of(args.share_limit)
    if loading.is_interleaved(args.model):
        raise CheckpointError(f"{args.model} is MM-Interleaved, which this page cannot show: it is for Mini-Gemini")
    pipeline = loading.load_to_answer(args, painter=_painter(args))
    pipeline.warm_up()
    from ..web.server import serve
    from ..web.site import WebOptions

    named = args.model.rstrip("/").rsplit("/", 1)[-1]
    options = WebOptions(
        host=args.host,
        port=args.port,
        root_path=args.root_path,
        limits=limits,
        accounts=accounts,
        allow_urls=args.allow_urls,
        drain_s=float(args.drain_seconds),
        hosts=tuple(args.hosts),
        title=f"Mini-Gemini: {named}",
    )
    serve(pipeline, options)
    return 0


def _painter(args):
    """The painter that is asked for. The model in the package has one of its own, which needs the extra `draw`."""
    if args.painter is not None or args.model != "nano":
        return drawing.load_painter(args)
    try:
        return drawing.load_painter(args, "nano")
    except BackendError as error:
        print(f"mg-fast: this page draws no pictures: {error}", file=sys.stderr)
        return None


def _limit(text: str) -> tuple[str, int]:
    from ..web.limits import limit_of

    try:
        return limit_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text[:20]!r}")
    return int(text)


def _root_path(text: str) -> str:
    from ..web.hosts import root_path_of

    try:
        return root_path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _host(text: str) -> str:
    from ..web.hosts import host_named

    try:
        return host_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
