"""Asks a language model that runs here, through transformers."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from mg_fast.errors import shortened

from .errors import AskingError
from .journal import Reply


class LocalModel:
    """A chat model of transformers, which answers the questions that wait at a time as one batch.

    Args:
        path: folder or hub id of a causal language model with a chat template, or a .gguf file with both (which
            transformers reads with the package `gguf`).
        batch_size: the most questions answered at once.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 decodes greedily; above 0 samples.
        seed: seed of the sampling.
        device: `cuda`, `cpu`, ...; default: a GPU if there is one.

    Raises:
        AskingError: the model cannot be loaded, or it has no chat template.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 300,
        temperature: float = 0.7,
        seed: int = 0,
        device: str | None = None,
    ):
        # Importing these takes seconds, and an endpoint is asked without them.
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = Path(path)
        self.where = f"the local model {shortened(str(file), 120)}"
        options = {}
        if file.suffix == ".gguf":
            path, options = file.parent, {"gguf_file": file.name}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **options)
            self._model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
        except (OSError, ValueError, ImportError) as error:
            raise AskingError(f"{shortened(str(file), 120)} cannot be loaded as a language model: {error}") from error
        if not self._tokenizer.chat_template:
            raise AskingError(
                f"{shortened(str(file), 120)} has no chat template: expected a model that was tuned to chat"
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = self._model.to(device).eval()
        self._batch_size = batch_size
        self._options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
            torch.manual_seed(seed)
        self._waiting: list[tuple[Sequence[dict], asyncio.Future]] = []
        self._working: asyncio.Task | None = None

    async def __aenter__(self) -> "LocalModel":
        return self

    async def __aexit__(self, *_) -> None:
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    async def ask(self, messages: Sequence[dict], name: str) -> Reply:
        """The reply to a chat, together with those to the other chats that wait at the moment."""
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append((messages, answered))
        if self._working is None or self._working.done():
            self._working = asyncio.ensure_future(self._work())
        return await answered

    async def _work(self) -> None:
        while self._waiting:
            # Others who are about to ask get the chance to join the batch.
            await asyncio.sleep(0.01)
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            try:
                replies = await _in_thread(self._answer, [messages for messages, _ in batch])
            except Exception as error:
                for _, answered in batch:
                    if not answered.done():
                        answered.set_exception(AskingError(f"the local model failed: {error}"))
                continue
            for (_, answered), reply in zip(batch, replies):
                if not answered.done():
                    answered.set_result(reply)

    def _answer(self, chats: Sequence[Sequence[dict]]) -> list[Reply]:
        import torch

        inputs = self._tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, **self._options)
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self._tokenizer.eos_token_id}
        replies = []
        for asked, row in zip(inputs["attention_mask"], ids[:, inputs["input_ids"].shape[1] :].tolist()):
            length = next((i for i, token in enumerate(row) if token in ends), None)
            # Some tokenizers would otherwise leave out spaces before punctuation.
            text = self._tokenizer.decode(row[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            finish = "length" if length is None else "stop"
            replies.append(Reply(text, finish, None, int(asked.sum()), len(row) if length is None else length + 1))
        return replies


async def _in_thread(function: Callable, argument):
    """The result of a function that runs in a thread of its own. Who gives up waiting leaves the thread behind.

    A loop waits at its end for the threads of `asyncio.to_thread`, which here may take as long as a batch.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(result, error) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result = error = None
        try:
            result = function(argument)
        except Exception as caught:
            error = caught
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True).start()
    return await done
