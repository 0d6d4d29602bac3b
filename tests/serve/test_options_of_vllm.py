"""vLLM's own parser takes the options of `mg-fast serve`, of its pages and of its files for containers."""

import re
import shlex

import pytest
import yaml

from mg_fast.cli.program import build_parser
from mg_fast.integrations.vllm_command import (
    TOKENIZER_MODE,
    VLLM_RELEASES,
    ServingEnvironment,
    server_command,
    why_not,
)
from tests.paths import ROOT
from tests.serve.engine import needs_vllm

pytestmark = [
    needs_vllm,
    # One process runs all of them, in their order.
    pytest.mark.xdist_group("http server"),
]


def test_this_environment_fits():
    environment = ServingEnvironment.found()
    assert why_not(environment) is None and environment.plugins == ("mg_fast",)


def test_the_releases_are_those_of_the_extra():
    described = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"^serve = \[\"vllm([^;\"]*)", described, re.MULTILINE)[1] == VLLM_RELEASES


def test_the_mode_is_that_of_the_plugin():
    from mg_fast.integrations.vllm.names import MODE

    assert TOKENIZER_MODE == MODE


@pytest.fixture(scope="module")
def parsed():
    """What vLLM's parser makes of a command of `mg-fast serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def parse(words: list[str]):
        args = build_parser().parse_args(words)
        return parser.parse_args(server_command("nano", args.vllm_options, args.template)[3:])

    return parse


def test_what_is_set(parsed):
    args = parsed(["serve", "--model", "nano", "--template", "chatml_direct"])
    assert args.model.endswith("nano") and args.served_model_name == ["nano"]
    assert args.limit_mm_per_prompt == {"image": 8} and args.max_num_batched_tokens == 2048
    assert args.allowed_media_domains == ["none.invalid"] and args.enable_prompt_tokens_details
    assert (args.tokenizer_mode, args.dtype) == ("mg_fast", "float32")
    assert args.override_generation_config == {"temperature": 0}
    assert args.hf_overrides == {"conversation_template": "chatml_direct"}


def test_what_a_user_sets_counts(parsed, tmp_path):
    (tmp_path / "options.yaml").write_text("served_model_name: other\nlimit-mm-per-prompt: {image: 3}\n")
    words = ["--config", str(tmp_path / "options.yaml"), "--max_num_batched_tokens=1k", "--dtype", "bfloat16"]
    words += ["--no-enable-prompt-tokens-details", "--allowed-media-domains", "a.example", "b.example"]
    args = parsed(["serve", "--model", "nano", *words])
    assert args.served_model_name == ["other"] and args.limit_mm_per_prompt == {"image": 3}
    assert args.max_num_batched_tokens == 1000 and args.dtype == "bfloat16"
    assert not args.enable_prompt_tokens_details and args.allowed_media_domains == ["a.example", "b.example"]


def commands_of_the_page() -> list[list[str]]:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    found = re.findall(r"^(mg-fast serve .*?)(?:  +#.*)?$", page, re.MULTILINE) + re.findall(
        r"`(mg-fast serve -[^`]*)`", page
    )
    return [shlex.split(text)[1:] for text in found]


def test_the_commands_of_the_page(parsed):
    commands = commands_of_the_page()
    assert len(commands) > 5
    for words in commands:
        parsed(words)


def test_the_files_for_containers(parsed):
    text = (ROOT / "recipes" / "serve" / "kubernetes.yaml").read_text(encoding="utf-8")
    deployment = next(document for document in yaml.safe_load_all(text) if document["kind"] == "Deployment")
    [server] = deployment["spec"]["template"]["spec"]["containers"]
    args = parsed(["serve", *server["args"]])
    assert args.port == 8000 and args.shutdown_timeout == 60
