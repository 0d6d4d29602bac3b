"""The page of a story: one HTML file that holds its pictures and needs nothing else."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

# The most pixels along a side of a given picture. Drawn pictures have 512.
_LARGEST_SIDE = 1024
_STYLE = """
:root { color-scheme: light dark; --text: #1d1d1f; --page: #fdfcfa; --soft: #6b6b70; --line: #dddad4; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e6e3; --page: #17181a; --soft: #9a9aa0; --line: #36373b; } }
body { margin: 0; background: var(--page); color: var(--text); font: 1.125rem/1.6 Georgia, "Times New Roman", serif; }
main { max-width: 38rem; margin: 0 auto; padding: 2.5rem 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 2rem; overflow-wrap: anywhere; }
p { margin: 0 0 1.25rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 0 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
figcaption, footer { color: var(--soft); font: 0.85rem/1.5 system-ui, sans-serif; }
figcaption { margin-top: 0.4rem; }
.given { color: var(--soft); }
footer { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1rem; overflow-wrap: anywhere; }
"""


class StoryPart(NamedTuple):
    """A text or a picture of a story, and whether the user gave it, or else the model made it."""

    content: str | Image.Image
    given: bool


def story_page(parts: Sequence[StoryPart], *, title: str, note: str) -> str:
    """The page's HTML. Texts are escaped, and pictures lie in it as data URLs.

    Args:
        parts: the texts and pictures in order.
        title: the heading.
        note: the line at the foot, which says how the story was made.
    """
    body, pictures = [], 0
    for content, given in parts:
        kind = ' class="given"' if given else ""
        if isinstance(content, str):
            if content.strip():
                body.append(f"<p{kind}>{html.escape(content.strip())}</p>")
            continue
        pictures += 1
        told = f"Picture {pictures}, {'given' if given else 'drawn by the model'}"
        size = f'width="{content.width}" height="{content.height}"'
        image = f'<img src="{_data_url(content)}" {size} alt="{told}">'
        body.append(f"<figure{kind}>{image}<figcaption>{told}</figcaption></figure>")
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{html.escape(title)}</h1>",
        *body,
        f"<footer>{html.escape(note)}</footer>",
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def shown_size(picture: Image.Image) -> Image.Image:
    """The picture, scaled down where it is larger than a page needs."""
    if max(picture.size) <= _LARGEST_SIDE:
        return picture
    smaller = picture.copy()
    smaller.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    return smaller


def write_page(file: Path, page: str) -> None:
    """Writes the page so that a reader finds either the old one or the new one as a whole, never a part."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _data_url(picture: Image.Image) -> str:
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
