"""The container file and the Kubernetes example: their files exist, their options are accepted, their parts fit."""

import json
import re

import pytest
import yaml

from mg_fast.cli.program import build_parser
from mg_fast.integrations.vllm_command import VLLM_RELEASES, given_options, server_command
from tests.paths import ROOT

FOLDER = ROOT / "recipes" / "serve"
NOT_RUN = {"Dockerfile": "has not been\n# built yet", "kubernetes.yaml": "has not\n# been applied yet"}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the container file: their names, and what follows; values of ARG and ENV are filled in."""
    found, values = [], {}
    for line in (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        name, rest = line.split(" ", 1)
        rest = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], rest)
        if name in ("ARG", "ENV"):
            key, value = rest.split("=", 1)
            values[key] = value
        found.append((name, rest))
    return found


def all_of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


@pytest.fixture
def documents():
    """The documents of the Kubernetes example by their kinds."""
    text = (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture
def pod(documents):
    return documents["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def server(pod):
    [server] = pod["containers"]
    return server


@pytest.mark.parametrize("file", NOT_RUN)
def test_each_says_that_it_was_not_run(file):
    assert NOT_RUN[file] in (FOLDER / file).read_text(encoding="utf-8")


# ---- the container file


def test_the_image_has_a_vllm_that_fits():
    from packaging.specifiers import SpecifierSet

    [image] = all_of("FROM")
    assert SpecifierSet(VLLM_RELEASES).contains(image.removeprefix("vllm/vllm-openai:v"))


def test_everything_that_the_wheel_is_built_from_is_copied():
    copied = [word for rest in all_of("COPY") for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    described = (ROOT / "pyproject.toml").read_text(encoding="utf-8") + (ROOT / "setup.py").read_text(encoding="utf-8")
    for file in ("README.md", "LICENSE", "NOTICE"):
        assert (file in described) == (file in copied)
    assert {"pyproject.toml", "setup.py", "mg_fast", "kernels"} <= set(copied)


def test_its_commands_are_accepted():
    runs = [rest.removeprefix("mg-fast ").split() for rest in all_of("RUN") if rest.startswith("mg-fast ")]
    assert [build_parser().parse_args(words).command for words in runs] == ["compile"]
    [entry], [default] = all_of("ENTRYPOINT"), all_of("CMD")
    program, *words = json.loads(entry)
    args = build_parser().parse_args([*words, *json.loads(default)])
    assert (program, args.command, args.model, args.vllm_options) == ("mg-fast", "serve", "nano", [])


def test_the_commands_in_its_comments_are_accepted():
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("#   docker run")]
    words = line.split("mg-fast-serve ")[1].split()
    assert build_parser().parse_args(["serve", *words]).model == "/models/MGM-7B"
    assert "-f recipes/serve/Dockerfile" in text
    assert f"-p {all_of('EXPOSE')[0]}:{all_of('EXPOSE')[0]} " in line


def test_it_runs_as_the_user_that_it_makes():
    [made] = [rest for rest in all_of("RUN") if rest.startswith("useradd")]
    [user] = all_of("USER")
    names = [name for name, _ in instructions()]
    assert f"--uid {user} " in made and names.index("USER") < names.index("ENTRYPOINT")
    # The kernels are compiled by the user who reads them, into a folder of this user.
    home = dict(rest.split("=") for rest in all_of("ENV"))
    assert f"--home-dir {home['HOME']} " in made and home["TRITON_CACHE_DIR"].startswith(home["HOME"])


# ---- Kubernetes


def test_the_options_of_the_server(server, pod, monkeypatch, tmp_path):
    args = build_parser().parse_args(["serve", *server["args"]])
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert args.model.startswith("/models/") and mounts["/models"]["readOnly"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in mounts.values()}
    assert all(word.startswith("--") and "=" in word for word in server["args"])
    # None of them stands in the way of what the command sets by itself.
    plain, here = server_command("nano", []), server_command("nano", args.vllm_options)
    assert here == plain + args.vllm_options


def test_the_probes_ask_the_port_that_is_served(server, documents):
    [port] = server["ports"]
    assert str(port["containerPort"]) == given_options(server["args"])["port"] == all_of("EXPOSE")[0]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[kind]["httpGet"] == {"path": "/health", "port": port["name"]}
    # A large checkpoint takes minutes to load, and is not stopped meanwhile.
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Service"]["spec"]["selector"] == labels
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels


def test_answers_may_end_before_the_process_is_killed(server, pod):
    draining = int(given_options(server["args"])["shutdown-timeout"])
    waiting = int(server["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert 0 < draining + waiting < pod["terminationGracePeriodSeconds"]


def test_the_user_is_that_of_the_image(pod):
    assert str(pod["securityContext"]["runAsUser"]) == all_of("USER")[0] and pod["securityContext"]["runAsNonRoot"]
