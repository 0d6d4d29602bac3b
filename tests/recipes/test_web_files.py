"""The container file of the web page, and nginx in front of it: their commands, paths and limits fit the code."""

import json
import re
import shutil
import subprocess
from urllib.parse import urlsplit

import pytest

from mg_fast.cli.program import build_parser
from mg_fast.web.limits import MIB, Limits
from tests.paths import ROOT

FOLDER = ROOT / "recipes" / "web"


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def instructions(name):
    """What follows an instruction of the container file, each time it stands there."""
    return re.findall(rf"^{name} (.*)", read("Dockerfile"), re.MULTILINE)


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
    whole = re.search(r"`mg-fast web --root-path (\S+)`", text)[1]
    root = urlsplit(build_parser().parse_args(["web", "--root-path", whole]).root_path).path
    for location in (f"location {root}/ {{", f"location = {root} {{", f"location = {root}/metrics {{"):
        assert location in text
    # Clients are told apart by the address that nginx sees, and not by what they say.
    assert "X-Forwarded-For $remote_addr;" in text


def test_nginx_takes_its_files(tmp_path):
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    zones, within = FOLDER / "nginx-zones.conf", FOLDER / "nginx.conf"
    main = tmp_path / "main.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"  {kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
    server = f"  server {{\n    listen unix:{tmp_path}/s;\n    include {within};\n  }}\n"
    main.write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\n  access_log off;\n{folders}  include {zones};\n{server}}}\n"
    )
    done = subprocess.run([nginx, "-t", "-p", str(tmp_path), "-c", str(main)], capture_output=True, text=True)
    assert done.returncode == 0 and "test is successful" in done.stderr, done.stderr


def test_the_page_about_it_shows_the_same():
    shown = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text("utf-8"), re.DOTALL)[1]
    settings = [line.strip() for line in shown.splitlines() if line.startswith(("    ", "limit_", "map "))]
    both = read("nginx.conf") + read("nginx-zones.conf")
    assert len(settings) > 15 and all(setting in both for setting in settings)


def test_the_documented_limits_are_the_defaults():
    text = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE))
    assert {name: int(number) for name, number in rows.items()} == vars(Limits())
