"""The container file of the web page, and nginx in front of it: their commands, paths and limits fit the code."""

import json
import re

from mg_fast.cli.program import build_parser
from mg_fast.web.limits import MIB, Limits
from tests.paths import ROOT

FOLDER = ROOT / "recipes" / "web"


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def instructions(name):
    """What follows an instruction of the container file, each time it stands there."""
    return re.findall(rf"^{name} (.*)", read("Dockerfile"), re.MULTILINE)


def test_the_container_says_that_it_was_not_built():
    assert "has not been built yet" in " ".join(read("Dockerfile").replace("#", "").split())


def test_the_container():
    copied = [word for rest in instructions("COPY") for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied) and {"mg_fast", "kernels", "constraints.txt"} <= set(copied)
    [entry], [default] = instructions("ENTRYPOINT"), instructions("CMD")
    program, *words = json.loads(entry)
    args = build_parser().parse_args([*words, *json.loads(default)])
    assert (program, args.command, args.model, args.host) == ("mg-fast", "web", "nano", "0.0.0.0")
    [port], [check] = instructions("EXPOSE"), instructions("HEALTHCHECK CMD")
    assert int(port) == args.port and f"127.0.0.1:{port}/healthz" in json.loads(check)[-1]
    [user] = instructions("USER")
    assert any(f"--uid {user} " in rest for rest in instructions("RUN"))
    line = next(line for line in read("Dockerfile").splitlines() if line.startswith("#   docker run"))
    assert build_parser().parse_args(["web", *line.split("mg-fast-web ")[1].split()]).model == "/models/MGM-7B"
    # The private folder of the page needs a place to write, and nothing else does.
    assert "--read-only --tmpfs /tmp" in line


def test_nginx():
    text, limits = read("nginx.conf"), Limits()
    # Uploads that the page takes pass, with what stands around them; much larger ones do not reach it.
    megabytes = int(re.search(r"client_max_body_size (\d+)m;", text)[1])
    assert limits.upload_bytes <= megabytes * MIB < 1.1 * limits.upload_bytes
    assert "proxy_buffering off;" in text and f"127.0.0.1:{build_parser().parse_args(['web']).port}/;" in text
    root = build_parser().parse_args(["web", "--root-path", "/pictures"]).root_path
    for location in (f"location {root}/ {{", f"location = {root} {{", f"location = {root}/metrics {{"):
        assert location in text
    assert f"mg-fast web --root-path {root}`" in text


def test_the_page_about_it_shows_the_same():
    shown = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text("utf-8"), re.DOTALL)[1]
    settings = [line.strip() for line in shown.splitlines() if line.startswith("    ")]
    assert len(settings) > 8 and all(setting in read("nginx.conf") for setting in settings)


def test_the_documented_limits_are_the_defaults():
    text = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE))
    assert {name: int(number) for name, number in rows.items()} == vars(Limits())
