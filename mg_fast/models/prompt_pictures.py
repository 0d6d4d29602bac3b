"""Finds the pictures that belong to the prompts of a batch, and opens those of messages."""

from collections.abc import Sequence

from ..errors import PromptError, quoted
from ..runtime.arguments import check_text
from .base64_text import as_data_uri
from .pictures import open_picture
from .templates import IMAGE_TAG


def match_pictures(texts: Sequence[str], images) -> list:
    """The pictures of a batch as one flat list, after a check against the prompts' tags."""
    counts = [prompt.count(IMAGE_TAG) for prompt in texts]
    if images is None:
        groups = None
        flat = []
    elif isinstance(images, (list, tuple)):
        nested = len(images) == len(texts) and all(isinstance(group, (list, tuple)) for group in images)
        groups = [list(group) for group in images] if nested else None
        flat = [image for group in groups for image in group] if groups is not None else list(images)
    else:
        groups, flat = None, [images]
    if groups is not None:
        for i, (count, group) in enumerate(zip(counts, groups)):
            if count != len(group):
                where = f"prompt {i + 1} of {len(texts)}" if len(texts) > 1 else "the prompt"
                raise PromptError(f"{where} has {count} {IMAGE_TAG} tag(s), but {len(group)} picture(s) came")
    if sum(counts) != len(flat):
        raise PromptError(
            f"the prompt{'s have' if len(texts) > 1 else ' has'} {sum(counts)} {IMAGE_TAG} tag(s), "
            f"but {len(flat)} picture(s) came"
        )
    return flat


def load_pictures(messages: Sequence[dict], opened: bool) -> list[dict]:
    """A copy of the messages, with every picture opened if `opened`. transformers writes into the messages it gets.

    Raises:
        PromptError: UTF-8 cannot encode a text.
        PictureError: a picture cannot be read.
    """
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [_load_part(part) if opened else dict(part) for part in content]
            texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
        else:
            texts = [content] if isinstance(content, str) else []
        for text in texts:
            check_text(text, f"the message of the {quoted(message.get('role'))}")
        out.append({**message, "content": content})
    return out


def _load_part(part: dict) -> dict:
    if part.get("type") == "image_url":
        url = part.get("image_url")
        part = {"type": "image", "url": url.get("url") if isinstance(url, dict) else url}
    if part.get("type") != "image":
        return part
    for key in ("image", "url", "path", "base64"):
        if part.get(key) is not None:
            value = as_data_uri(part[key]) if key == "base64" else part[key]
            return {"type": "image", "image": open_picture(value, allow_urls=key in ("url", "base64"))}
    raise PromptError(f"a message's picture needs one of image, path, url or base64, got {quoted(sorted(part))}")
