"""A web page on which a person reads some of what was made, beside what it was made of."""

import html
import random
from collections.abc import Mapping, Sequence

from .counts import TITLES, Rejected
from .sources import KINDS, RECAPTION, Source

# Rejected sources on the page.
REJECTED_SHOWN = 20
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
article { border: 1px solid #ccc; border-radius: 6px; margin: 1rem 0; padding: 0.5rem 1rem; }
.source { color: #555; white-space: pre-wrap; } .human { font-weight: 600; } .gpt, .human { white-space: pre-wrap; }
.note { color: #777; font-size: 0.85em; } .long { color: #a40; }
"""


def sample_page(
    made: Sequence[tuple[Source, Mapping]], rejected: Sequence[Rejected], *, count: int, seed: int = 0
) -> str:
    """A web page with dialogues of each kind beside what they were made of, and with rejected answers.

    Args:
        made: each source with its dialogue.
        rejected: the sources without one.
        count: the number of dialogues of each kind, chosen at random.
        seed: seed of the choice.
    """
    rng, parts = random.Random(seed), []
    for kind in KINDS:
        of_kind = [pair for pair in made if pair[0].kind == kind]
        chosen = rng.sample(of_kind, min(count, len(of_kind)))
        parts.append(f"<h2>{TITLES[kind]}: {len(chosen)} of {len(of_kind)}</h2>")
        parts += [_article(source, dialogue) for source, dialogue in chosen]
    chosen = rng.sample(list(rejected), min(REJECTED_SHOWN, len(rejected)))
    parts.append(f"<h2>Rejected: {len(chosen)} of {len(rejected)}</h2>")
    for one in chosen:
        said = f'<p class="gpt">{html.escape(one.reply)}</p>' if one.reply else ""
        parts.append(
            f'<article><p class="note">{html.escape(one.source.name)}: {html.escape(str(one.fault))}</p>'
            f'<p class="source">{html.escape(_shown(one.source))}</p>{said}</article>'
        )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Samples of generation data</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>Samples of generation data</h1>\n{body}\n</body></html>\n"
    )


def _article(source: Source, dialogue: Mapping) -> str:
    note = f"{source.name}, {dialogue['clip_tokens']} CLIP tokens"
    long = ' <span class="long">too long for CLIP</span>' if dialogue["long"] else ""
    parts = [f'<p class="note">{html.escape(note)}{long}</p>']
    if source.kind == RECAPTION:
        parts.append(f'<p class="source">{html.escape(source.caption)}</p>')
    parts += [f'<p class="{turn["from"]}">{html.escape(turn["value"])}</p>' for turn in dialogue["conversations"]]
    return f"<article>{''.join(parts)}</article>"


def _shown(source: Source) -> str:
    return source.caption or "\n".join(text for turn in source.turns for text in turn)
