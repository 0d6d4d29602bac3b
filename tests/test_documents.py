"""The pages: their Python runs with nano, their commands are understood, and their links lead somewhere."""

import argparse
import contextlib
import importlib
import inspect
import io
import re
import shlex
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import mg_fast
from mg_fast.cli.program import build_parser
from mg_fast.models import builtin
from recipes.nano.scenes import draw_scene
from tests.paths import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")]
    + list((ROOT / "recipes").rglob("*.md"))
)
# The names of models and pictures in the blocks of the pages.
MODELS = ("nano", "YanweiLi/MGM-7B")
INTERLEAVED = "mm_interleaved"
PICTURES = ("photo.jpg", "a.jpg", "b.jpg")
MOST_SKIPPED = 3
LONGEST_README = 130
WIDEST = 120

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


# ---- Python


@pytest.fixture(scope="module")
def nano():
    return mg_fast.load("nano")


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory):
    """A tiny MM-Interleaved with random weights in the published layout."""
    pytest.importorskip("diffusers")
    from mg_fast.testing.random_interleaved import build_interleaved

    return build_interleaved(tmp_path_factory.mktemp(INTERLEAVED))


@pytest.fixture
def desk(nano, one_thread, tmp_path, monkeypatch):
    """A working directory in which nano lies under the names of the pages, with pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mg_fast, "load", loader(nano))
    (tmp_path / "YanweiLi").mkdir()
    (tmp_path / "YanweiLi" / "MGM-7B").symlink_to(builtin.resolve("nano"))
    for i, name in enumerate(PICTURES):
        draw_scene(5, i, split="unseen", number="4083").image.save(name)


def loader(nano: mg_fast.Pipeline) -> Callable[..., mg_fast.Pipeline]:
    """`mg_fast.load`, which loads anew only where it is given options."""
    load = mg_fast.load

    def loaded(path, **options) -> mg_fast.Pipeline:
        inspect.signature(load).bind(path, **options)
        assert path in (*MODELS, INTERLEAVED)
        return load(path, **options) if options or path == INTERLEAVED else mg_fast.Pipeline(nano.model, nano.processor)

    return loaded


def run_python(page: Path) -> tuple[int, list[str]]:
    """Runs the Python blocks of a page in one namespace; returns how many ran, and why the others are skipped."""
    ran, skipped = 0, []
    for example in Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page):
        try:
            example.evaluate()
            ran += not isinstance(example.parsed, tuple)
        except unittest.SkipTest as reason:
            skipped.append(str(reason))
    return ran, skipped


@each_page
def test_python_runs(page, desk, request, tmp_path):
    if f'"{INTERLEAVED}"' in page.read_text(encoding="utf-8"):
        (tmp_path / INTERLEAVED).symlink_to(request.getfixturevalue("interleaved"))
    ran, skipped = run_python(page)
    assert ran + len(skipped) == page.read_text(encoding="utf-8").count("```python\n")


def test_few_blocks_are_skipped_and_each_says_why():
    skips = [skip for page in PAGES for skip in re.findall(r"<!--+ *skip.*", page.read_text(encoding="utf-8"))]
    assert 0 < len(skips) <= MOST_SKIPPED
    assert all(re.fullmatch(r'<!-- skip: next "[\w ,]+" -->', skip) for skip in skips), skips


def test_python_that_fails_is_seen(desk, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport mg_fast\n```\n\ntext\n\n```python\nmg_fast.load('nano', quantise='int8')\n```\n")
    with pytest.raises(TypeError, match="quantise"):
        run_python(page)


# ---- commands


class Command(NamedTuple):
    """A command on a page; `mention` where it stands within a sentence, in which arguments may be left out."""

    line: int
    text: str
    mention: bool


_FENCE = re.compile(r"^ *```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^ *```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_WITHIN_SENTENCES = re.compile(r"(?:[A-Z_]+=\S+ )*(?:mg-fast|make|pip|pytest|(?:\S*/)?python -m)(?: |$)")
# Programs of others, whose arguments are not checked.
_FOREIGN = ("git", "cd", "lmms-eval")


def commands(text: str) -> Iterator[Command]:
    """The lines of fenced blocks that name no language, and the spans of code that begin with a program of ours."""
    for fence in _FENCE.finditer(text):
        if fence["language"] in ("", "sh", "bash", "console"):
            first = text.count("\n", 0, fence.start("body")) + 1
            for i, line in enumerate(fence["body"].splitlines()):
                yield Command(first + i, line.strip(), False)
    prose = _FENCE.sub(lambda fence: "\n" * fence.group().count("\n"), text)
    for span in _SPAN.finditer(prose):
        if _WITHIN_SENTENCES.match(words := " ".join(span[1].split())):
            yield Command(prose.count("\n", 0, span.start()) + 1, words, True)


def faults(text: str) -> list[str]:
    """A line for each wrong command of a page."""
    found = ((command, fault(command.text, command.mention)) for command in commands(text))
    return [f"line {command.line}: `{command.text}`: {wrong}" for command, wrong in found if wrong]


def fault(text: str, mention: bool) -> str | None:
    """The reason why a command would be refused; None if it would be accepted."""
    words = shlex.split(text, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return None
    program, words = Path(words[0]).name, words[1:]
    if program == "python" and words[:1] == ["-m"]:
        program, words = (["pytest"] if words[1:2] == ["pytest"] else words[1:2])[0], words[2:]
        return _of_pytest(words) if program == "pytest" else _of_module(program, words, mention)
    if program == "mg-fast":
        return _refusal(build_parser(), words, mention)
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        unknown = [word for word in words if word not in targets]
        return f"the Makefile has no target {', '.join(unknown)}" if unknown else None
    if program == "accelerate":
        return _of_accelerate(words, mention)
    if program == "pip":
        return None if mention and not words else _of_pip(words)
    if program == "pytest":
        return _of_pytest(words)
    return None if program in _FOREIGN else f"{program} is no program that is known here"


def _refusal(parser: argparse.ArgumentParser, words: list[str], mention: bool) -> str | None:
    """A parser's error for these words; of a command that is only mentioned, the parser must know the name."""
    if mention and (not words or len(words) == 1 and not words[0].startswith("-")):
        found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not words or (found and words[0] in found[0].choices):
            return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parser.parse_args(words)
    except SystemExit as ended:
        return said.getvalue().strip().splitlines()[-1] if ended.code else None
    return None


def _of_module(name: str, words: list[str], mention: bool) -> str | None:
    # Importing the program of another package would run it.
    is_package = (ROOT / name.replace(".", "/") / "__main__.py").is_file()
    try:
        module = importlib.import_module(f"{name}.__main__" if is_package else name)
    except ImportError as error:
        return str(error)
    parser = _parser_of(module)
    if parser is not None:
        return _refusal(parser, words, mention)
    return f"{name} takes no arguments, and these came: {' '.join(words)}" if words else None


class _Parsing(Exception):
    """Raised in the place of parsing; its argument is the parser."""


def _parser_of(module: ModuleType) -> argparse.ArgumentParser | None:
    """The parser that a program's `main` makes; None where it makes none."""
    if "argparse" not in vars(module):
        return None

    def parse_args(parser, *_):
        raise _Parsing(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Parsing) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        module.main()
    return caught.value.args[0]


def _of_accelerate(words: list[str], mention: bool) -> str | None:
    """A launch of one of our modules with a configuration file of ours."""
    if words[:2] != ["launch", "--config_file"] or words[3:4] != ["-m"]:
        return "expected accelerate launch --config_file FILE -m MODULE"
    if not (ROOT / words[2]).is_file() and not words[2].isupper():
        return f"there is no {words[2]}"
    return _of_module(words[4], words[5:], mention)


def _of_pytest(words: list[str]) -> str | None:
    if words and not words[0].startswith("-") and not (ROOT / words[0]).exists():
        return f"there is no {words[0]}"
    return None


def _of_pip(words: list[str]) -> str | None:
    if words[:1] != ["install"]:
        return "only pip install is expected"
    # Python 3.10 has no reader of TOML.
    optional = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^(\w+) = \[", optional.split("\n[")[0], re.MULTILINE)
    named = [extra for word in words for part in re.findall(r"\[([\w,]+)\]", word) for extra in part.split(",")]
    unknown = [extra for extra in named if extra not in extras]
    return f"there is no extra {', '.join(unknown)}" if unknown else None


@each_page
def test_commands_are_understood(page):
    assert faults(page.read_text(encoding="utf-8")) == []


def test_there_are_commands_of_every_kind():
    texts = [command.text for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    for program in ("mg-fast run", "make ", "pip ", "pytest ", "python -m bench ", "python -m recipes."):
        assert any(text.startswith(program) for text in texts), program


BAD_PAGE = """
```
mg-fast run --model DIR --prompt TEXT       # right
mg-fast run --model DIR --prompt TEXT --photo FILE
mg-fast fly
python -m bench run --quickly
python -m recipes.nano.train DIR --sead 1
make tests-of-everything
pip install '.[quantum]'
pytest tests/nowhere.py
rm -rf DIR
accelerate launch --config_file recipes/nothing.yaml -m recipes.finetune CONFIG.yaml
accelerate launch --config_file recipes/finetune/accelerate/fsdp2-8gpu.yaml -m recipes.finetune CONFIG.yaml --chek
```

```text
not a command
```

Right are `mg-fast compile` and `python -m bench report
--check`; wrong are `mg-fast compiled`, `python -m bench
repart --check`, `python -m recipes.demos` and `mg-fast run --model DIR`.
"""


def test_wrong_commands_are_seen():
    wrong = faults(BAD_PAGE)
    assert [int(line.split(":")[0].removeprefix("line ")) for line in wrong] == [*range(4, 14), 21, 21, 22, 22]
    assert "unrecognized arguments: --photo FILE" in wrong[0] and "--quickly" in wrong[2] and "--sead" in wrong[3]
    assert "no target tests-of-everything" in wrong[4] and "no extra quantum" in wrong[5]
    assert "there is no recipes/nothing.yaml" in wrong[8] and "--chek" in wrong[9]
    assert "required: --prompt" in wrong[-1]


# ---- links, places, lengths


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}, which is no heading there"


@each_page
def test_places_exist(page):
    named = re.findall(r"`((?:mg_fast|kernels|bench|tests|recipes|docs)/[\w./*-]*)`", page.read_text(encoding="utf-8"))
    for path in named:
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}, which is not there"


@each_page
def test_lines_are_not_wide(page):
    """Rows of tables, links and commands cannot be broken."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    wide = [line for line in text.splitlines() if len(line) > WIDEST and not line.startswith("|")]
    assert [line for line in wide if not re.search(r"\]\(\S+\)|https://", line)] == []


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_README
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        assert f"]({page.relative_to(ROOT).as_posix()})" in text
