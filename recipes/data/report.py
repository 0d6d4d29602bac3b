"""What a run has made, for a person to read: counts of everything, and a page with samples."""

import html
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .asking import Tally
from .checks import CLIP_TOKENS, Fault
from .sources import IN_CONTEXT, KINDS, RECAPTION, Source

# Rejected sources on the page of samples.
REJECTED_SHOWN = 20
_TITLES = {RECAPTION: "Re-captions", IN_CONTEXT: "In-context prompts"}


@dataclass(frozen=True)
class Rejected:
    """A source of which no dialogue was made.

    Attributes:
        source: the source.
        fault: why.
        reply: what the model wrote last; empty where nothing was asked.
    """

    source: Source
    fault: Fault
    reply: str = ""


@dataclass
class Counts:
    """What became of the sources.

    Attributes:
        rows: sources by kind, as they were read.
        skipped: rows of the files that no source could be made of, by reason.
        repeated: sources that say the same as an earlier one, by kind.
        unfit: sources about which nothing was asked, by reason.
        open: sources without a good answer that will be asked again, by kind.
        rejected: sources whose answers were all bad, by the reason of the last one.
        faults: bad answers, by reason, those of sources with a good answer included.
        alike: dialogues left out because an earlier one is nearly the same, by kind.
        made: dialogues, by kind.
        long: of these, those with a prompt that is too long for CLIP, by kind.
        lengths: the number of CLIP tokens of each prompt that was made.
        tokens: tokens of the requests and replies that were read, as far as the endpoint counts them.
    """

    rows: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)
    repeated: Counter = field(default_factory=Counter)
    unfit: Counter = field(default_factory=Counter)
    open: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    alike: Counter = field(default_factory=Counter)
    made: Counter = field(default_factory=Counter)
    long: Counter = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    tokens: Counter = field(default_factory=Counter)


def report(counts: Counts, settings: Mapping, tally: Tally | None) -> str:
    """The report of a run in Markdown.

    Args:
        counts: what became of the sources.
        settings: what the replies depend on, from the journal.
        tally: what happened in this run; None where nothing was asked.
    """
    lines = ["# Generation data", "", ", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines += ["| | " + " | ".join(_TITLES[kind] for kind in KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for name, counter in (
        ("sources in the files", counts.rows),
        ("say the same as an earlier source", counts.repeated),
        ("not answered yet, asked by the next run", counts.open),
        ("dialogues nearly the same as an earlier one", counts.alike),
        ("**dialogues**", counts.made),
        (f"of these longer than {CLIP_TOKENS} CLIP tokens (marked)", counts.long),
    ):
        lines.append(f"| {name} | " + " | ".join(str(counter[kind]) for kind in KINDS) + " |")
    if counts.lengths:
        ordered = sorted(counts.lengths)
        quartiles = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        lines += ["", f"CLIP tokens of the prompts, least, quartiles and most: {', '.join(map(str, quartiles))}."]
    if counts.tokens:
        lines += ["", "Tokens so far: " + ", ".join(f"{n} of {name}" for name, n in counts.tokens.items()) + "."]
    for title, counter in (
        ("Rows of the files that are no source", counts.skipped),
        ("Sources that are not asked about", counts.unfit),
        ("Sources whose answers were all bad, by the last one", counts.rejected),
        ("Bad answers, the corrected ones included", counts.faults),
    ):
        lines += _table(title, counter)
    if tally is not None:
        state = "It was stopped before its end. " if tally.stopped else ""
        lines += ["", "## This run", ""]
        lines += [f"{state}{tally.sent} requests, {tally.replies} replies, {tally.seconds:.0f} seconds."]
        lines += _table("Requests that failed", tally.troubles)
        lines += _table("Questions left for the next run", tally.left)
    return "\n".join(lines) + "\n"


def _table(title: str, counter: Counter) -> list[str]:
    if not counter:
        return []
    # A table's cell ends at a bar.
    rows = [f"| {' '.join(name.split()).replace('|', '/')} | {count} |" for name, count in counter.most_common()]
    return ["", f"## {title}", "", "| reason | number |", "|---|---|", *rows]


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
        parts.append(f"<h2>{_TITLES[kind]}: {len(chosen)} of {len(of_kind)}</h2>")
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
