"""Turns prompts and pictures into MM-Interleaved's inputs, and ids into text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import to_py_obj

from ...errors import CheckpointError, PromptError, quoted
from ...runtime.arguments import check_text
from ..families import MM_INTERLEAVED, checkpoint_family, is_published_interleaved, told_family
from ..prompt_pictures import load_pictures, match_pictures
from ..registration import register_processor
from ..templates import IMAGE_TAG
from ..tensor_files import HUB_ARGUMENTS, resolve_folder
from .configuration import LLM_MAX_IMAGES, MMInterleavedConfig
from .image_processing import PLACEHOLDER, MMInterleavedImageProcessor
from .prompts import CHAT_TEMPLATE
from .published import read_sections, side_folder
from .tokenization import IMAGE_TOKEN, SOI_TOKEN, VOCABULARY_FILE, MMInterleavedTokenizer

# Arguments that transformers' Auto classes and pipelines pass along and that this processor does not need.
_AUTO_ARGUMENTS = {"dtype", "torch_dtype", "device_map", "trust_remote_code", "code_revision"}
_AUTO_ARGUMENTS |= {"_from_auto", "_from_pipeline", "_commit_hash"}
# The special tokens by the names that the configuration gives their ids.
_TOKENS = {"bos_token_id": "<s>", "eos_token_id": "</s>", "soi_token_id": SOI_TOKEN, "image_token_id": IMAGE_TOKEN}


class MMInterleavedProcessor(ProcessorMixin):
    """Turns prompts and pictures into model inputs.

    A prompt holds one `<image>` for each of its pictures, at any place. In the ids a picture is one
    `<|beginofimage|>` and `num_img_token` times `<|image|>`; blanks beside it vanish.

    Args:
        image_processor: a `MMInterleavedImageProcessor`.
        tokenizer: a `MMInterleavedTokenizer`.
        num_img_token: tokens of a picture.
        pad_token_id: the id that fills up a batch. Default: the last id of the language model's own vocabulary.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_img_token: int = 64,
        pad_token_id: int | None = None,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        tokenizer.chat_template = self.chat_template
        self.num_img_token = num_img_token
        self.pad_token_id = tokenizer.vocab_size - 1 if pad_token_id is None else pad_token_id

    @property
    def placeholder(self):
        """What stands in `images` for a picture that is still to be drawn."""
        return PLACEHOLDER

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "num_image_per_seq"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *, llm: str | os.PathLike | None = None, **kwargs
    ) -> "MMInterleavedProcessor":
        """Loads the processor of a checkpoint in the published layout, or one that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder or hub id.
            llm: a folder or hub id of the language model, whose tokenizer is used, where it is not where config.yaml
                says.
            **kwargs: hub arguments (`cache_dir`, `revision`, `token`, `local_files_only`, `force_download`). `clip` and
                `diffusion`, which the model takes, are accepted and not needed.

        Raises:
            CheckpointError: there is no configuration or no tokenizer, or the two name other ids for a special token,
                or the checkpoint belongs to another family.
        """
        given = {key: value for key, value in kwargs.items() if value not in (None, "")}
        if unknown := given.keys() - set(HUB_ARGUMENTS) - _AUTO_ARGUMENTS - {"clip", "diffusion"}:
            raise TypeError(f"MMInterleavedProcessor.from_pretrained: unknown arguments {quoted(sorted(unknown))}")
        hub = {key: given[key] for key in HUB_ARGUMENTS if key in given}
        folder = resolve_folder(pretrained_model_name_or_path, weights=False, **hub)
        settings, ids = _read_settings(folder)
        if llm is None and is_published_interleaved(folder) and not (folder / VOCABULARY_FILE).is_file():
            home = side_folder(folder, "llm", **hub)
        else:
            home = folder if llm is None else side_folder(folder, "llm", llm, **hub)
        tokenizer = MMInterleavedTokenizer.from_folder(home)
        for name, text in _TOKENS.items():
            found = tokenizer.convert_tokens_to_ids(text)
            if ids.get(name, found) != found:
                raise CheckpointError(
                    f"{folder}: the configuration says {name} {ids[name]}, but {text} has the id {found} in the "
                    f"tokenizer of {home}: expected the tokenizer that the checkpoint was trained with"
                )
        return cls(MMInterleavedImageProcessor(), tokenizer, **settings)

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        draw: bool = False,
        add_special_tokens: bool = True,
        allow_urls: bool = False,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Makes the model inputs of one prompt or a batch.

        Args:
            images: pictures in the order of their tags: one picture, a flat list, or one list per text. `placeholder`
                stands for a picture that is still to be drawn.
            text: prompts; each holds one `<image>` per picture.
            return_tensors: `pt`, `np` or None for lists.
            padding: fill up a batch to its longest prompt. Default: only when there are several prompts.
            padding_side: `left`, as text generation needs it, or `right`, as drawing needs it. Default: `left`, with
                `draw` `right`.
            draw: put a picture that is still to be drawn behind every prompt.
            add_special_tokens: put a beginning-of-sequence token before every prompt.
            allow_urls: fetch pictures given as URLs.
            device: where the pixels are put. Ids and masks stay on the CPU.

        Returns:
            `input_ids`, `attention_mask` [B, L], `num_image_per_seq` [B], and, where there are pictures,
            `pixel_values` [n_images, 3, 224, 224], float32 in 0..1.

        Raises:
            PromptError: there is no text, a prompt is empty, the numbers of `<image>` tags and pictures differ, more
                than 49 pictures would be visible at once, or a text spells out `<|image|>` or `<|beginofimage|>`.
            PictureError: a picture cannot be read.
        """
        # apply_chat_template of transformers passes None for the modalities that it did not find.
        ignored = {"videos": None, "audio": None, "truncation": False}
        if unknown := {key for key, value in kwargs.items() if key not in ignored or value not in (None, False)}:
            raise TypeError(f"MMInterleavedProcessor: unknown arguments {quoted(sorted(unknown))}")
        if padding not in (None, True, False, "longest", "do_not_pad"):
            raise TypeError(f"padding: expected True ('longest') or False ('do_not_pad'), got {quoted(padding)}")
        if padding_side not in (None, "left", "right"):
            raise TypeError(f"padding_side: expected 'left' or 'right', got {quoted(padding_side)}")
        if text is None:
            raise PromptError(
                "expected text=, a prompt with one <image> per picture; pictures alone go to processor.image_processor"
            )
        if not isinstance(text, (str, Sequence)):
            raise PromptError(f"text: expected a prompt or a list of prompts, got {quoted(text)}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise PromptError("expected at least one prompt, got none")
        for i, prompt in enumerate(texts):
            if not isinstance(prompt, str):
                raise PromptError(f"prompt {i + 1} of {len(texts)}: expected a text, got {quoted(prompt)}")
            if not prompt.strip():
                raise PromptError(f"prompt {i + 1} of {len(texts)} is empty: {quoted(prompt)}")
        flat = match_pictures(texts, images)
        counts = [prompt.count(IMAGE_TAG) for prompt in texts]
        if draw:
            flat = _with_last(flat, counts)
            texts, counts = [prompt + IMAGE_TAG for prompt in texts], [count + 1 for count in counts]
        rows = [self.encode(prompt, add_special_tokens=add_special_tokens) for prompt in texts]

        longest = max(map(len, rows))
        pad = padding not in (False, "do_not_pad") if padding is not None else len(rows) > 1
        if not pad and return_tensors and len(set(map(len, rows))) > 1:
            raise PromptError("prompts of different lengths cannot be one tensor: pass padding=True")
        right = (padding_side or ("right" if draw else "left")) == "right"
        data: dict = {"input_ids": [], "attention_mask": []}
        for ids in rows:
            fill = [self.pad_token_id] * (longest - len(ids) if pad else 0)
            data["input_ids"].append(ids + fill if right else fill + ids)
            real, none = [1] * len(ids), [0] * len(fill)
            data["attention_mask"].append(real + none if right else none + real)
        data["num_image_per_seq"] = counts
        if flat:
            data.update(self.image_processor(flat, return_tensors="pt", allow_urls=allow_urls, device=device))
        return BatchFeature(data, tensor_type=return_tensors)

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one prompt, each `<image>` as `<|beginofimage|>` and the tokens of a picture.

        Raises:
            PromptError: UTF-8 cannot encode the text, it spells out a token of pictures, or more pictures would be
                visible at once than the model has relative positions for.
        """
        check_text(prompt, "the prompt")
        for token in (SOI_TOKEN, IMAGE_TOKEN):
            if token in prompt:
                raise PromptError(
                    f"the prompt spells out the special token {token}: write {IMAGE_TAG} where a picture stands, and "
                    "leave these tokens out of texts"
                )
        block = SOI_TOKEN + IMAGE_TOKEN * self.num_img_token
        ids = self.tokenizer(prompt.replace(IMAGE_TAG, block), add_special_tokens=add_special_tokens).input_ids
        soi, bos = self.tokenizer.convert_tokens_to_ids(SOI_TOKEN), self.tokenizer.bos_token_id
        visible = 0
        for id in ids:
            # A beginning-of-sequence token inside a prompt hides the pictures before it.
            visible = 0 if id == bos else visible + (id == soi)
            if visible >= LLM_MAX_IMAGES:
                raise PromptError(
                    f"the prompt has {prompt.count(IMAGE_TAG)} pictures, of which {visible} or more are visible at "
                    f"once: the model has relative positions for {LLM_MAX_IMAGES - 1}"
                )
        return ids

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """The text of ids, or a list of texts for rows of ids. The ids that fill up a batch are special tokens here."""
        ids = to_py_obj(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
        if skip_special_tokens:
            ids = [id for id in ids if id != self.pad_token_id]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """The texts of rows of ids."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in to_py_obj(token_ids)]

    def apply_chat_template(self, messages, chat_template=None, **kwargs):
        """Turns messages into a prompt or, with tokenize=True, into model inputs, like the method of transformers.

        The prompt has the original's instruction format: `You are a helpful assistant. USER: ... ASSISTANT:`. Pictures
        stand where the messages' content has them: {"type": "image", "image" | "path" | "url" | "base64": ...}.
        """
        if not messages:
            raise PromptError("a conversation needs at least one message, got none")
        batched, opened = not isinstance(messages[0], dict), kwargs.get("tokenize", False)
        conversations = [load_pictures(m, opened) for m in (messages if batched else [messages])]
        return super().apply_chat_template(conversations if batched else conversations[0], chat_template, **kwargs)


def _with_last(flat: Sequence, counts: Sequence[int]) -> list:
    """The flat list of pictures with a placeholder behind the pictures of every prompt."""
    pictures, found = iter(flat), []
    for count in counts:
        found += [next(pictures) for _ in range(count)] + [PLACEHOLDER]
    return found


def _read_settings(folder: Path) -> tuple[dict, dict]:
    """The processor's settings, and the ids of special tokens by name, from the folder's own files.

    Raises:
        CheckpointError: the folder has neither a saved processor nor a configuration of this family.
    """
    stored_file = folder / "processor_config.json"
    if stored_file.is_file():
        stored = json.loads(stored_file.read_text(encoding="utf-8"))
        if stored.get("processor_class") == MMInterleavedProcessor.__name__:
            return {name: stored[name] for name in ("num_img_token", "pad_token_id") if name in stored}, {}
    if is_published_interleaved(folder):
        model, _ = read_sections(folder)
        ids = model.get("special_token_dict") or {}
        published = {"num_img_token": model.get("num_img_token"), "pad_token_id": ids.get("pad_token_id")}
        return {name: value for name, value in published.items() if value is not None}, dict(ids)
    if checkpoint_family(folder) == MM_INTERLEAVED:
        config = MMInterleavedConfig.from_pretrained(folder)
        ids = {name: getattr(config, name) for name in _TOKENS if isinstance(getattr(config, name), int)}
        return {"num_img_token": config.num_img_token, "pad_token_id": config.pad_token_id}, ids
    raise CheckpointError(
        f"{folder} has no config.yaml, no config.json and no processor_config.json of MM-Interleaved: expected a "
        f"checkpoint in the published layout, or one that save_pretrained wrote{told_family(folder, MM_INTERLEAVED)}"
    )


register_processor(MMInterleavedConfig, MMInterleavedProcessor)
