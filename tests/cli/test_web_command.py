"""`mg-fast web`: its options, what is said where its extra is missing, and that nothing else needs gradio."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mg_fast import BackendError, cli
from mg_fast.cli import web
from mg_fast.cli.program import build_parser
from mg_fast.web import requirements
from tests.paths import ROOT


def test_without_the_extra_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(requirements, "_NEEDED", ("gradio_of_nobody",))
    assert cli.main(["web"]) == 6
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("mg-fast: error: the web page needs gradio") and "pip install 'mg_fast[ui]'" in err


def test_options():
    args = build_parser().parse_args(["web"])
    assert (args.model, args.host, args.port, args.share_limit) == ("nano", "127.0.0.1", 7860, [])
    assert (args.painter, args.auth, args.root_path, args.allow_urls, args.drain_seconds) == (None, None, "", False, 60)
    words = ["web", "--model", "DIR", "--painter", "P", "--steps", "4", "--root-path", "/pictures/", "--port", "0"]
    args = build_parser().parse_args([*words, "--share-limit", "sessions=3", "--share-limit", "queue=0"])
    assert (args.model, args.steps, args.root_path, args.port) == ("DIR", 4, "/pictures", 0)
    assert args.share_limit == [("sessions", 3), ("queue", 0)]
    assert build_parser().parse_args(["web", "--hosts", "a.example", "B.example"]).hosts == ["a.example", "b.example"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--share-limit", "sesions=3"], "expected NAME=NUMBER with a name of sessions, address_sessions"),
        (["--share-limit", "sessions=0"], "sessions: expected a whole number of 1 or more, got 0"),
        (["--port", "70000"], "expected a port from 0 to 65535, got '70000'"),
        (["--root-path", "pictures"], "expected a path that begins with /"),
        (["--root-path", "/p;Path=/x"], "expected a path that begins with /"),
        (["--hosts", "https://a.example"], "expected a name such as pictures.example"),
        (["--drain-seconds", "0"], "expected a whole number of 1 or more"),
    ],
)
def test_wrong_usage(capsys, words, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(["web", *words])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_file_of_accounts_is_found_before_anything_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(requirements, "_NEEDED", ())
    assert cli.main(["web", "--model", "nowhere", "--auth", str(tmp_path / "none")]) == 5
    assert "--auth" in capsys.readouterr().err
    assert cli.main(["web", "--model", "nowhere"]) == 3


@pytest.mark.parametrize(
    "words, painter",
    [
        ([], "nano"),
        (["--model", "nano", "--steps", "4"], "nano"),
        (["--painter", "P"], "P"),
        (["--model", "DIR"], None),
        (["--model", "DIR", "--painter", "P"], "P"),
    ],
)
def test_nano_draws_by_its_own_painter(monkeypatch, capsys, words, painter):
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: `make test` installs it")
    served = []
    monkeypatch.setattr(web.loading, "is_interleaved", lambda model: False)
    monkeypatch.setattr(web.loading, "load_to_answer", lambda args, painter: SimpleNamespace(warm_up=lambda: painter))
    monkeypatch.setattr("mg_fast.drawing.load_painter", lambda path, **options: (path, options["steps"]))
    monkeypatch.setattr("mg_fast.web.server.serve", lambda pipeline, options: served.append(pipeline.warm_up()))
    assert cli.main(["web", *words]) == 0
    steps = 4 if "--steps" in words else None
    assert served == [None if painter is None else (painter, steps)]

    def missing(path, **options):
        raise BackendError("drawing needs the extra `draw`")

    monkeypatch.setattr("mg_fast.drawing.load_painter", missing)
    if painter == "nano":
        assert cli.main(["web", *words]) == 0 and served[1:] == [None]
        assert capsys.readouterr().err == "mg-fast: this page draws no pictures: drawing needs the extra `draw`\n"
    elif painter == "P":
        # What is asked for and cannot be had is an error.
        assert cli.main(["web", *words]) == 6


@pytest.mark.slow
def test_help_and_import_need_no_gradio():
    code = (
        "import sys, mg_fast, mg_fast.cli.program as program\n"
        "program.build_parser().format_help()\n"
        "others = ('gradio', 'fastapi', 'uvicorn', 'prometheus_client', 'torch')\n"
        "found = [name for name in others if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
