"""mg-fast serve: hands a model to vLLM's server, which speaks OpenAI's protocol."""

import os
import shlex
import sys

from ..errors import BackendError
from .options import add_debug


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a Mini-Gemini over HTTP with vLLM",
        description="Starts vLLM's server, which speaks OpenAI's protocol, with the options that the model needs: a "
        "token budget for several pictures, a limit of pictures in a prompt, no fetching of pictures from other hosts, "
        "cached tokens in the usage, and a short name of the model. Every other option is vLLM's and is passed on "
        "unchanged, as in --port 8000 or --tensor-parallel-size=2; options that you give replace those that would be "
        "set. vLLM then takes the place of this process.",
        epilog="`python -m vllm.entrypoints.launchers.api_server.entry --help=all` lists the options of vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="checkpoint folder, hub id, or `nano`, a small model in the package",
    )
    parser.add_argument("--template", metavar="NAME", help="prompt template (default: the checkpoint's own)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the command that would be run; if it cannot run here, the reason goes to stderr",
    )
    add_debug(parser)
    parser.keep_unknown("vllm_options")
    parser.set_defaults(action=command)


def command(args) -> int:
    # The environment is checked before torch is imported, which takes seconds.
    from ..integrations.vllm_command import ServingEnvironment, server_command, why_not

    reason = why_not(ServingEnvironment.found())
    if reason is not None and not args.dry_run:
        raise BackendError(reason)
    words = server_command(args.model, args.vllm_options, args.template)
    if args.dry_run:
        print(shlex.join(words))
        if reason is not None:
            print(f"mg-fast: this command cannot run here: {reason}", file=sys.stderr)
        return 0
    print(f"mg-fast: {shlex.join(words)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM takes the place of this process, so signals reach it, and its exit status is that of the command.
    os.execv(words[0], words)
