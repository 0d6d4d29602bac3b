"""Builds the dialogues: sources are checked, asked about, judged, and written as one file in LLaVA's format."""

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .asking import Asker, Manners, Question, Tally, ask_all
from .checks import CLIP_TOKENS, Fault, check_dialogue, check_source, clip_tokens, judge
from .counts import Counts, Rejected
from .duplicates import NearDuplicates
from .journal import Journal
from .report import report
from .samples import sample_page
from .sources import Source, Sources
from .wording import dialogue, messages

JOURNAL, DIALOGUES, REJECTED = "journal.jsonl", "dialogues.json", "rejected.jsonl"
REPORT, SAMPLES = "report.md", "samples.html"
# How many answers to one question are read before its source is given up.
TRIES = 2
SHOWN = 20


@dataclass(frozen=True)
class Plan:
    """The sources of a run that are worth asking about.

    Attributes:
        sources: in the order in which they were read, each kind of contents once.
        counts: what became of the others.
        rejected: those that are unfit.
    """

    sources: tuple[Source, ...]
    counts: Counts
    rejected: tuple[Rejected, ...]


def plan(read: Sequence[Sources], *, most: int | None = None) -> Plan:
    """Leaves out sources that repeat an earlier one and those that would make a bad dialogue.

    Args:
        read: the sources of each file.
        most: the most sources of each kind; None takes all.
    """
    counts, kept, rejected, seen = Counts(), [], [], set()
    taken: Counter = Counter()
    for one in read:
        # A file holds sources of one kind.
        counts.skipped.update((one.usable[0].kind, reason) for _, reason in one.skipped)
        for source in one.usable:
            if source.key in seen:
                counts.repeated[source.kind] += 1
                continue
            seen.add(source.key)
            try:
                check_source(source)
            except Fault as fault:
                counts.unfit[source.kind, fault.reason] += 1
                rejected.append(Rejected(source, fault))
                continue
            if most is not None and taken[source.kind] >= most:
                counts.beyond[source.kind] += 1
                continue
            taken[source.kind] += 1
            kept.append(source)
    return Plan(tuple(kept), counts, tuple(rejected))


def elsewhere(planned: Plan, journal: Journal) -> int:
    """How many sources have replies in the journal and are not among those of the plan."""
    given = {source.key for source in planned.sources} | {one.source.key for one in planned.rejected}
    return len(journal.replies.keys() - given)


async def ask(
    sources: Sequence[Source],
    asker: Asker,
    journal: Journal,
    manners: Manners,
    *,
    tries: int = TRIES,
    refused_again: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Tally:
    """Asks about every source until an answer is good or `tries` answers were bad; see `ask_all`.

    What the endpoint refused in an earlier run is asked again only if `refused_again`.
    """
    by_key = {source.key: source for source in sources}
    again = set(journal.refused) if refused_again else set()

    def settled(key: str) -> bool:
        if key in journal.refused and key not in again:
            return True
        return judge(by_key[key], journal.replies.get(key, ())[:tries]).settled(tries)

    questions = [Question(source.key, messages(source)) for source in sources]
    return await ask_all(questions, asker, journal, settled, manners, progress)


def write(
    folder: str | Path,
    planned: Plan,
    journal: Journal,
    *,
    tally: Tally | None = None,
    tries: int = TRIES,
    shown: int = SHOWN,
    count_tokens: Callable[[str], int] | None = None,
) -> Counts:
    """Writes the dialogues, the rejected sources, the report and the page of samples, all from the journal.

    Args:
        folder: where the files are written; earlier ones are replaced.
        planned: the sources.
        journal: the replies.
        tally: what happened in this run, for the report.
        tries: how many answers to one question are read.
        shown: the number of dialogues of each kind on the page of samples.
        count_tokens: counts the tokens of a prompt, with the two at its ends; None: as CLIP does.

    Returns:
        The counts of the report.
    """
    folder, counts = Path(folder), copy.deepcopy(planned.counts)
    count_tokens = count_tokens or clip_tokens
    made, rejected, prompts = [], list(planned.rejected), NearDuplicates()
    counts.elsewhere = elsewhere(planned, journal)
    for source in planned.sources:
        replies = journal.replies.get(source.key, [])[:tries]
        for reply in replies:
            counts.tokens["prompts"] += reply.prompt_tokens or 0
            counts.tokens["answers"] += reply.completion_tokens or 0
        verdict = judge(source, replies)
        counts.faults.update((source.kind, fault.reason) for fault in verdict.faults)
        if verdict.fields is None:
            if (words := journal.refused.get(source.key)) is not None:
                counts.refused[source.kind, words] += 1
                rejected.append(Rejected(source, Fault("refused by the endpoint", words)))
            elif not verdict.settled(tries):
                counts.open[source.kind] += 1
            else:
                counts.rejected[source.kind, verdict.faults[-1].reason] += 1
                rejected.append(Rejected(source, verdict.faults[-1], replies[-1].text))
            continue
        if (earlier := prompts.add(verdict.fields["prompt"], source.name)) is not None:
            counts.alike[source.kind] += 1
            rejected.append(Rejected(source, Fault("nearly the same", f"as the prompt of {earlier}"), replies[-1].text))
            continue
        tokens = count_tokens(verdict.fields["prompt"])
        made.append((source, dialogue(source, verdict.fields, clip_tokens=tokens, most_tokens=CLIP_TOKENS)))
        check_dialogue(made[-1][1])
        counts.made[source.kind] += 1
        counts.long[source.kind] += made[-1][1]["long"]
        counts.lengths.append(tokens)
    rows = [
        {"source": one.source.name, "kind": one.source.kind, "reason": one.fault.reason, "detail": one.fault.detail}
        | ({"reply": one.reply} if one.reply else {})
        for one in rejected
    ]
    for name, text in {
        DIALOGUES: json.dumps([one for _, one in made], indent=1) + "\n",
        REJECTED: "".join(json.dumps(row) + "\n" for row in rows),
        REPORT: report(counts, journal.settings, tally),
        SAMPLES: sample_page(made, rejected, count=shown),
    }.items():
        _replace(folder / name, text)
    return counts


def _replace(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the process ends."""
    part = path.with_name(f"{path.name}.part")
    # Half a surrogate pair, which a rejected reply can hold, has no UTF-8.
    part.write_text(text.encode("utf-8", "replace").decode(), encoding="utf-8")
    os.replace(part, path)
