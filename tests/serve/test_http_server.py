"""The server of `mg-fast serve` with nano, asked by OpenAI's own client: answers, usage, refusals, and its end.

The server is a process of its own. Nano's answers by `Pipeline` are what its answers are held against.
"""

import asyncio
import base64
import re
import signal
import time
import urllib.request

import pytest

import mg_fast
from bench.served import Server, is_alive
from bench.serving_load import QUESTION, numbered_picture
from tests.paths import ROOT
from tests.serve.engine import needs_vllm

pytestmark = [
    needs_vllm,
    # One process runs all of them, in their order.
    pytest.mark.xdist_group("http server"),
]
# Blocks of 32 tokens, so that nano's short prompts find what is known.
OPTIONS = ("--block-size", "32", "--enforce-eager", "--max-num-seqs", "32", "--shutdown-timeout", "60")
NUMBERS = [str(1000 + 7919 * i % 9000) for i in range(200)]
CLIENTS = 16


@pytest.fixture(scope="module")
def server():
    with Server("nano", OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    import openai

    # The server closes connections that are idle for 5 s, perhaps while the next request is on its way.
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def nano():
    return mg_fast.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def answers(nano, one_thread_for_all):
    """What `Pipeline` answers about the picture of each number."""
    asked = [{"text": QUESTION, "images": [numbered_picture(number)]} for number in NUMBERS]
    return {number: answer.text for number, answer in zip(NUMBERS, nano.chat_batch(asked, max_new_tokens=32))}


@pytest.fixture(scope="module")
def one_thread_for_all():
    import torch

    torch.set_num_threads(1)


def picture(data: bytes, kind: str = "jpeg") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def question(text: str, *pictures: dict) -> dict:
    content = [*pictures, {"type": "text", "text": text}]
    # The server's own temperature is 0.
    return {"model": "nano", "messages": [{"role": "user", "content": content}], "max_tokens": 32}


def ask(client, text: str, *pictures: dict, **more):
    return client.chat.completions.create(**question(text, *pictures), **more)


# ---- answers


def test_the_model_is_called_nano(client):
    assert [model.id for model in client.models.list().data] == ["nano"]


def test_text(client, nano):
    for text in ("Hello.", "How many circles are there?"):
        answer = ask(client, text)
        assert answer.choices[0].message.content.strip() == nano.conversation().chat(text, max_new_tokens=32).text


def test_a_picture_and_the_end_of_the_turn(client, nano):
    for number in NUMBERS[:3]:
        expected = nano.conversation().chat(QUESTION, [numbered_picture(number)], max_new_tokens=32)
        answer = ask(client, QUESTION, picture(numbered_picture(number)))
        [choice] = answer.choices
        assert choice.message.content.strip() == expected.text and number in expected.text
        # The answer ends with its turn, long before the most tokens.
        assert choice.finish_reason == expected.finish_reason == "stop" and "<|im_end|>" not in choice.message.content
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.completion_tokens == len(expected.token_ids) < 32


def test_two_pictures(client, nano):
    files = [numbered_picture(number) for number in NUMBERS[:2]]
    for order in (files, files[::-1]):
        expected = nano.conversation().chat(QUESTION, order, max_new_tokens=32)
        answer = ask(client, QUESTION, *map(picture, order))
        assert answer.choices[0].message.content.strip() == expected.text
        assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_a_second_turn(client, nano):
    file, conversation = numbered_picture(NUMBERS[4]), nano.conversation()
    first = conversation.chat(QUESTION, [file], max_new_tokens=32).text
    second = conversation.chat("How many circles are there?", max_new_tokens=32).text
    messages = question(QUESTION, picture(file))["messages"]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "How many circles are there?"}]
    asked = question("") | {"messages": messages}
    assert client.chat.completions.create(**asked).choices[0].message.content.strip() == second


def test_a_stream(client):
    shown = picture(numbered_picture(NUMBERS[5]))
    whole = ask(client, QUESTION, shown)
    events = list(ask(client, QUESTION, shown, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 3
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    usage = [event.usage for event in events if event.usage][-1]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_says_what_was_known(client):
    shown = picture(numbered_picture("4321"))
    first, again = (ask(client, QUESTION, shown).usage for _ in range(2))
    known = [(usage.prompt_tokens_details.cached_tokens or 0) for usage in (first, again)]
    # What stands before the picture may be known already, the picture is not. Later, whole blocks are known.
    assert known[0] <= 32 < known[1] <= again.prompt_tokens and known[1] % 32 == 0
    other = ask(client, QUESTION, picture(numbered_picture("4322"))).usage
    assert (other.prompt_tokens_details.cached_tokens or 0) <= 32


def test_many_clients_each_about_its_own_number(server, answers):
    """200 requests of 16 clients at once: every answer is the one about its own picture."""
    import openai

    assert len(set(answers)) == 200 and sum(number in answer for number, answer in answers.items()) > 160
    waiting, found = list(NUMBERS), {}

    async def one_client(client) -> None:
        while waiting:
            number = waiting.pop()
            answer = await client.chat.completions.create(**question(QUESTION, picture(numbered_picture(number))))
            found[number] = answer.choices[0].message.content.strip()

    async def all_clients() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
        ) as client:
            await asyncio.gather(*(one_client(client) for _ in range(CLIENTS)))

    asyncio.run(all_clients())
    assert found == answers


def test_the_client_of_the_page(server, monkeypatch, tmp_path, capsys):
    """The program in docs/deployment.md runs."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "photo.jpg").write_bytes(numbered_picture(NUMBERS[0]))
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:8000/v1" in program
    exec(compile(program.replace("http://127.0.0.1:8000", server.url), "docs/deployment.md", "exec"), {})
    assert NUMBERS[0] in capsys.readouterr().out


# ---- refusals


def url(address: str) -> dict:
    return {"type": "image_url", "image_url": {"url": address}}


NUMBER = picture(numbered_picture("1234"))
# The request, and what its refusal says.
BAD = {
    "no base64": (question(QUESTION, url("data:image/png;base64,%%%")), "base64"),
    "no picture": (question(QUESTION, picture(b"This is no picture.")), "image"),
    "half a picture": (question(QUESTION, picture(numbered_picture("1234")[:2000])), "picture|image|truncated"),
    "too many pictures": (question(QUESTION, *[NUMBER] * 9), "At most 8 image"),
    "a tag without a picture": (question("What is <image>?"), r"1 <image> tag\(s\), but 0 picture\(s\) came"),
    "more tags than pictures": (question("<image> and <image>?", NUMBER), "<image>"),
    "the filler beside a picture": (question("What is <unk>?", NUMBER), "<unk>"),
    "a context that is too long": (question("one two three " * 600), "1024"),
    "a URL": (question(QUESTION, url("http://127.0.0.1:9/picture.png")), "allowed domains"),
    "no such model": (question(QUESTION) | {"model": "other"}, "other"),
    "no question": (question(" "), "empty"),
    "an answer first": (question(QUESTION) | {"messages": [{"role": "assistant", "content": "Hello."}]}, "alternate"),
    "no messages": (question(QUESTION) | {"messages": []}, ""),
    "no tokens": (question(QUESTION) | {"max_tokens": -1}, "max_tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_a_sentence(client, name):
    import openai

    request, said = BAD[name]
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**request)
    assert 400 <= refused.value.status_code < 500, refused.value.message
    assert re.search(said, refused.value.message), refused.value.message


def test_files_of_the_server_are_not_shown(client):
    """vLLM refuses them, by an error of the server."""
    import openai

    with pytest.raises(openai.APIStatusError, match="Cannot load local files"):
        ask(client, QUESTION, url((ROOT / "docs" / "images" / "explain.png").as_uri()))


def test_bad_requests_leave_the_server_as_it_was(client, server, answers):
    import openai

    for request, _ in BAD.values():
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**request)
    assert server.is_ready()
    number = NUMBERS[7]
    assert (
        ask(client, QUESTION, picture(numbered_picture(number))).choices[0].message.content.strip() == answers[number]
    )


# ---- clients that go away, and the end


def metric(server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_a_client_that_goes_away_frees_its_request(client, server):
    """The answer would have 800 tokens. The engine stops long before."""
    before = metric(server, "vllm:generation_tokens_total")
    stream = ask(client, QUESTION, NUMBER, stream=True, extra_body={"ignore_eos": True, "max_tokens": 800})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        # The figures are brought up to date when the engine does something.
        ask(client, "Hello.")
        if metric(server, "vllm:num_requests_running") == 0:
            break
        time.sleep(0.2)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:generation_tokens_total") - before < 700


def test_sigterm_ends_it_cleanly(client, server):
    """The last test: a running answer ends first (--shutdown-timeout), then the server and all of its processes."""
    stream = ask(client, QUESTION, NUMBER, stream=True, extra_body={"ignore_eos": True, "max_tokens": 400})
    events = iter(stream)
    next(events)
    group = server.process.pid
    assert is_alive(group)
    server.process.send_signal(signal.SIGTERM)
    assert [event.choices[0].finish_reason for event in events][-1] == "length"
    deadline = time.monotonic() + 120
    while (server.process.poll() is None or is_alive(group)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (server.process.returncode, is_alive(group)) == (0, False), server.last_lines()
