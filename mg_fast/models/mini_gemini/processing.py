"""Turns pictures and prompts into the model's inputs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ...errors import CheckpointError, PromptError, quoted
from ...runtime.arguments import check_text
from .. import templates
from ..prompt_pictures import load_pictures, match_pictures
from ..registration import register_processor
from ..templates import IMAGE_TAG, get_template
from ..tensor_files import HUB_ARGUMENTS, resolve_folder
from .checkpoint import decide_template, geometry_config, load_tokenizer
from .configuration import MiniGeminiConfig
from .image_processing import MiniGeminiImageProcessor

# Arguments that transformers' Auto classes and pipelines pass along and that this processor does not need.
_AUTO_ARGUMENTS = {
    "dtype",
    "torch_dtype",
    "device_map",
    "trust_remote_code",
    "_from_auto",
    "_from_pipeline",
    "code_revision",
    "_commit_hash",
}


class MiniGeminiProcessor(ProcessorMixin):
    """Turns prompts and pictures into model inputs.

    Args:
        image_processor: a `MiniGeminiImageProcessor`.
        tokenizer: the checkpoint's tokenizer.
        template: name of the prompt template (`mg_fast.models.templates.TEMPLATES`).
    """

    def __init__(self, image_processor=None, tokenizer=None, template: str | None = None, chat_template=None):
        get_template(template)
        self.template = template
        super().__init__(image_processor, tokenizer, chat_template=chat_template or templates.chat_template(template))
        # A caller who uses only the tokenizer must not get a base model's own template.
        tokenizer.chat_template = self.chat_template
        self.filler_id = _filler_id(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        template: str | None = None,
        base_model: str | os.PathLike | None = None,
        **kwargs,
    ) -> "MiniGeminiProcessor":
        """Loads the processor of a checkpoint, by folder or hub id.

        Published folders need no preprocessor_config.json.

        Args:
            template: overrides the prompt template, which is otherwise read or decided from the checkpoint.
            base_model: the base language model of a stage-1 adapter folder. Its tokenizer is used, and its config.json
                if the folder has none.
            **kwargs: hub arguments (`cache_dir`, `revision`, `token`, `local_files_only`, `force_download`).

        Raises:
            CheckpointError: there is no configuration or no tokenizer.
            PromptError: the template is unknown.
        """
        unknown = (
            {key for key, value in kwargs.items() if value not in (None, "")} - set(HUB_ARGUMENTS) - _AUTO_ARGUMENTS
        )
        if unknown:
            raise TypeError(f"MiniGeminiProcessor.from_pretrained: unknown arguments {quoted(sorted(unknown))}")
        if template is not None:
            get_template(template)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        folder = resolve_folder(pretrained_model_name_or_path, weights=False, **hub)
        base = resolve_folder(base_model, weights=False, **hub) if base_model is not None else None
        stored_file = folder / "processor_config.json"
        stored = json.loads(stored_file.read_text(encoding="utf-8")) if stored_file.is_file() else {}
        if stored and not (folder / "config.json").is_file():
            # The processor was saved on its own, without its model.
            return cls(
                MiniGeminiImageProcessor(**stored["image_processor"]),
                load_tokenizer(folder),
                template=template or stored["template"],
            )
        config = geometry_config(folder, base)
        tokenizer = load_tokenizer(folder, base)
        return cls.of_checkpoint(config, tokenizer, folder, template=template)

    @classmethod
    def of_checkpoint(
        cls, config: MiniGeminiConfig, tokenizer, folder: Path, *, template: str | None = None
    ) -> "MiniGeminiProcessor":
        """The processor of a checkpoint whose configuration and tokenizer are loaded already.

        Args:
            config: with the geometry of the towers.
            tokenizer: a tokenizer of transformers. Its chat template is set.
            folder: the checkpoint's local folder. A template that `save_pretrained` wrote there is used.
            template: overrides the prompt template.
        """
        stored_file, saved = folder / "processor_config.json", folder / "chat_template.jinja"
        stored = json.loads(stored_file.read_text(encoding="utf-8")) if stored_file.is_file() else {}
        # Only a template that this class saved counts: these checkpoints were not trained with a base model's template.
        own = saved.read_text(encoding="utf-8") if stored and template is None and saved.is_file() else None
        template = decide_template(config, tokenizer, template or stored.get("template"))
        images = MiniGeminiImageProcessor.from_config(config)
        return cls(images, tokenizer, template=template, chat_template=own)

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        add_special_tokens: bool = True,
        allow_urls: bool = False,
        device: torch.device | str | None = None,
        decoder: str = "pillow",
        **kwargs,
    ) -> BatchFeature:
        """Makes the model inputs of one prompt or a batch.

        Args:
            images: pictures in the order of their tags: one picture, a flat list, or one list per text.
            text: prompts; each holds one `<image>` per picture.
            return_tensors: `pt`, `np` or None for lists.
            padding: pad a batch on the left to its longest prompt. Default: only when there are several prompts.
            add_special_tokens: let the tokenizer add its beginning-of-sequence token.
            allow_urls: fetch pictures given as URLs.
            device, decoder: where pictures are resized and how they are decoded, see `MiniGeminiImageProcessor`. Ids
                and marks stay on the CPU.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` [B, L] (1 where a picture stands), and with pictures
            `pixel_values` [n_images, V, 3, LR, LR] and `pixel_values_hr` [n_images, 3, HR, HR].

        Raises:
            PromptError: there is no text, a prompt is empty, or the numbers of `<image>` tags and pictures differ.
            PictureError: a picture cannot be read.
        """
        if kwargs.get("truncation"):
            raise TypeError("MiniGeminiProcessor: truncation is not offered, a cut prompt would lose its question")
        # apply_chat_template of transformers passes None for the modalities that it did not find.
        unknown = {key for key, value in kwargs.items() if not (key in ("videos", "audio") and value is None)} - {
            "truncation"
        }
        if unknown:
            raise TypeError(f"MiniGeminiProcessor: unknown arguments {quoted(sorted(unknown))}")
        if padding not in (None, True, False, "longest", "do_not_pad"):
            raise TypeError(
                f"MiniGeminiProcessor: padding is True ('longest') or False ('do_not_pad'), got {quoted(padding)}"
            )
        if text is None:
            raise PromptError(
                "expected text=, a prompt with one <image> per picture; pictures alone go to processor.image_processor"
            )
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise PromptError("expected at least one prompt, got none")
        for i, prompt in enumerate(texts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise PromptError(f"prompt {i + 1} of {len(texts)} is empty: {quoted(prompt)}")
            check_text(prompt, f"prompt {i + 1} of {len(texts)}")
        flat = match_pictures(texts, images)
        rows = [self.encode(prompt, add_special_tokens=add_special_tokens) for prompt in texts]

        longest = max(len(ids) for ids, _ in rows)
        pad = padding not in (False, "do_not_pad") if padding is not None else len(rows) > 1
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.filler_id
        data: dict = {"input_ids": [], "attention_mask": [], "mm_token_type_ids": []}
        for ids, marks in rows:
            gap = longest - len(ids) if pad else 0
            data["input_ids"].append([pad_id] * gap + ids)
            data["attention_mask"].append([0] * gap + [1] * len(ids))
            data["mm_token_type_ids"].append([0] * gap + marks)
        if not pad and return_tensors and len({len(ids) for ids, _ in rows}) > 1:
            raise PromptError("prompts of different lengths cannot be one tensor: pass padding=True")
        if flat:
            options = {"allow_urls": allow_urls, "device": device, "decoder": decoder}
            data.update(self.image_processor(flat, return_tensors=return_tensors, **options))
        return BatchFeature(data, tensor_type=return_tensors)

    def encode(
        self, prompt: str, *, add_special_tokens: bool = True, places: int | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids and picture marks (1 at picture positions) of one prompt.

        Every piece between `<image>` tags is tokenized by itself and only one BOS is kept, as in the original. A
        picture takes as many positions as it has tokens, or `places`.

        Raises:
            PromptError: UTF-8 cannot encode the text.
        """
        check_text(prompt, "the prompt")
        pieces = [
            self.tokenizer(piece, add_special_tokens=add_special_tokens).input_ids for piece in prompt.split(IMAGE_TAG)
        ]
        bos = self.tokenizer.bos_token_id
        has_bos = bool(pieces[0]) and bos is not None and pieces[0][0] == bos
        ids, marks = list(pieces[0]), [0] * len(pieces[0])
        for piece in pieces[1:]:
            picture = self.image_processor.tokens_per_picture if places is None else places
            # Without special tokens, only the first piece can have a BOS, which the prompt spells out.
            piece = piece[1:] if has_bos and piece[:1] == [bos] else piece
            ids += [self.filler_id] * picture + piece
            marks += [1] * picture + [0] * len(piece)
        return ids, marks

    def apply_chat_template(self, messages, chat_template=None, **kwargs):
        """Turns messages into a prompt or, with tokenize=True, into model inputs, like the method of transformers.

        Pictures come from the messages' content: {"type": "image", "image" | "path" | "url" | "base64": ...}. `url` may
        be a web address, which is then fetched. `processor_kwargs` ({"device": "cuda"}) are passed to the processor.
        """
        if not messages:
            raise PromptError("a conversation needs at least one message, got none")
        batched = not isinstance(messages[0], dict)
        conversations = [load_pictures(m, kwargs.get("tokenize", False)) for m in (messages if batched else [messages])]
        return super().apply_chat_template(conversations if batched else conversations[0], chat_template, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "pixel_values_hr"]


def _filler_id(tokenizer) -> int:
    """The in-vocabulary id that marks a picture's places: unk, or Llama-3's reserved token, or pad; never eos."""
    vocabulary = tokenizer.get_vocab()
    for candidate in (tokenizer.unk_token_id, vocabulary.get("<|reserved_special_token_0|>"), tokenizer.pad_token_id):
        if candidate is not None and candidate != tokenizer.eos_token_id:
            return candidate
    raise CheckpointError("the tokenizer has no unk, reserved or pad token that could mark a picture's places")


register_processor(MiniGeminiConfig, MiniGeminiProcessor)
