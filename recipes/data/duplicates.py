"""Finds texts that say nearly the same as an earlier one."""

import re
from collections import defaultdict

# Runs of this many words are compared. Texts with fewer words count as one run.
RUN = 4
# The share of common runs, of all runs that two texts have, from which on they count as the same.
ALIKE = 0.6
# A run that so many texts have, such as one of a style that many prompts end with, brings no texts together.
COMMON = 50


class NearDuplicates:
    """Texts seen so far, by their runs of words; case, punctuation and white space do not count.

    Two texts are compared if they share a run that is not common to many.

    Args:
        alike: the share of common runs from which on two texts count as the same; 1 finds only equal texts.
    """

    def __init__(self, alike: float = ALIKE):
        self._alike = alike
        self._texts: list[tuple[str, frozenset[int]]] = []
        self._holders: dict[int, list[int]] = defaultdict(list)

    def add(self, text: str, name: str) -> str | None:
        """Remembers a text, unless it is nearly one that is remembered: then the name of that one is returned."""
        runs = _runs(text)
        held = [self._holders[run] for run in runs if run in self._holders]
        near = {holder for holders in held if len(holders) < COMMON for holder in holders}
        for holder in sorted(near):
            other, its_runs = self._texts[holder]
            common = len(runs & its_runs)
            if common / (len(runs) + len(its_runs) - common) >= self._alike:
                return other
        for run in runs:
            if len(self._holders[run]) < COMMON:
                self._holders[run].append(len(self._texts))
        self._texts.append((name, runs))
        return None


def _runs(text: str) -> frozenset[int]:
    """The hashes of the runs of a text, which take less memory than their words."""
    words = re.findall(r"\w+", text.casefold())
    if len(words) <= RUN:
        return frozenset({hash(tuple(words))})
    return frozenset(hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1))
