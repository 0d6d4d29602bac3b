"""A local chat model answers what waits as one batch, with the answers that each question gets alone."""

import asyncio
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.data.errors import AskingError
from recipes.data.local import LocalModel

WORDS = ["<unk>", "</s>", "user", "assistant", ":", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
CHATS = [[{"role": "user", "content": " ".join(f"w{i}" for i in range(length))}] for length in (2, 9, 5)]
NEW = 6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with random weights and a chat template."""
    path = tmp_path_factory.mktemp("chat")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), eos_token_id=1, initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def ask(model: LocalModel, chats) -> list:
    async def all_of_them():
        async with model:
            return await asyncio.gather(*(model.ask(chat, str(i)) for i, chat in enumerate(chats)))

    return asyncio.run(all_of_them())


def test_a_batch_answers_as_each_alone(folder, monkeypatch):
    model = LocalModel(folder, batch_size=3, max_new_tokens=NEW, temperature=0, device="cpu")
    alone = [ask(model, [chat])[0] for chat in CHATS]
    assert len({reply.text for reply in alone}) > 1
    sizes, answer = [], model._answer
    monkeypatch.setattr(model, "_answer", lambda chats: sizes.append(len(chats)) or answer(chats))
    assert ask(model, CHATS) == alone and sizes == [3]
    for reply, chat in zip(alone, CHATS):
        # "user :", the words, and "assistant :".
        assert reply.prompt_tokens == len(chat[0]["content"].split()) + 4
        assert (reply.finish, reply.completion_tokens) == ("length", NEW)


def test_an_answer_that_ends_by_itself_is_whole(folder):
    model = LocalModel(folder, max_new_tokens=NEW, temperature=0, device="cpu")
    first = ask(model, CHATS[:1])[0].text.split()[0]
    model._model.generation_config.eos_token_id = [WORDS.index(first)]
    [reply] = ask(model, CHATS[:1])
    assert (reply.text, reply.finish, reply.completion_tokens) == ("", "stop", 1)


def test_what_cannot_be_asked(folder, tmp_path):
    with pytest.raises(AskingError, match="cannot be loaded as a language model"):
        LocalModel(tmp_path / "nothing")
    for file in folder.iterdir():
        if file.suffix != ".jinja":
            text = file.read_bytes().replace(b'"chat_template"', b'"no_template"')
            (tmp_path / file.name).write_bytes(text)
    with pytest.raises(AskingError, match="has no chat template"):
        LocalModel(tmp_path)


def test_nobody_waits_for_a_batch_that_was_given_up(folder, monkeypatch):
    model, release = LocalModel(folder, device="cpu"), threading.Event()
    monkeypatch.setattr(model, "_answer", lambda chats: release.wait(60))

    async def give_up():
        async with model:
            await asyncio.wait_for(model.ask(CHATS[0], "0"), 0.1)

    began = time.monotonic()
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(give_up())
    assert time.monotonic() - began < 30
    release.set()


def test_a_failure_of_the_model_ends_the_run(folder, monkeypatch):
    model = LocalModel(folder, device="cpu")
    monkeypatch.setattr(model, "_answer", lambda chats: 1 / 0)
    with pytest.raises(AskingError, match="the local model failed: division by zero"):
        ask(model, CHATS[:1])
