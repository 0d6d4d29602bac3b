"""What became of the sources of a run, in numbers."""

from collections import Counter
from dataclasses import dataclass, field

from .checks import Fault
from .sources import IN_CONTEXT, RECAPTION, Source

TITLES = {RECAPTION: "Re-captions", IN_CONTEXT: "In-context prompts"}


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
    """What became of the captions and conversations of the files: each is in one count from `skipped` to `made`.

    Attributes:
        skipped: those that no source could be made of, by kind and reason.
        repeated: those that say the same as an earlier one, by kind.
        unfit: those about which nothing was asked because of what they say, by kind and reason.
        beyond: those that were left out because there are more than wanted, by kind.
        open: those without a good answer that will be asked again, by kind.
        refused: those whose question the endpoint refused, by kind and its reason.
        rejected: those whose answers were all bad, by kind and the reason of the last one.
        alike: those whose dialogue was left out because an earlier one is nearly the same, by kind.
        made: those that became dialogues, by kind.
        long: of these, those with a prompt that is too long for CLIP, by kind.
        faults: bad answers, by kind and reason, those of sources with a good answer included.
        lengths: the number of CLIP tokens of each prompt that was made.
        tokens: tokens of the requests and replies that were read, as far as the endpoint counts them.
        elsewhere: replies in the journal that are about none of the sources.
    """

    skipped: Counter = field(default_factory=Counter)
    repeated: Counter = field(default_factory=Counter)
    unfit: Counter = field(default_factory=Counter)
    beyond: Counter = field(default_factory=Counter)
    open: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    alike: Counter = field(default_factory=Counter)
    made: Counter = field(default_factory=Counter)
    long: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    tokens: Counter = field(default_factory=Counter)
    elsewhere: int = 0
