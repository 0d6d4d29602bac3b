"""Finds texts that say nearly the same as an earlier one."""

import re
from collections import Counter, defaultdict

# Runs of this many words are compared. Texts with fewer words count as one run.
RUN = 4
# The share of common runs, of all runs that two texts have, from which on they count as the same.
ALIKE = 0.6


class NearDuplicates:
    """Texts seen so far, by their runs of words; case, punctuation and white space do not count.

    Args:
        alike: the share of common runs from which on two texts count as the same; 1 finds only equal texts.
    """

    def __init__(self, alike: float = ALIKE):
        self._alike = alike
        self._runs: list[int] = []
        self._names: list[str] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str, name: str) -> str | None:
        """Remembers a text, unless it is nearly one that is remembered: then the name of that one is returned."""
        runs = _runs(text)
        common = Counter(holder for run in runs for holder in self._holders.get(run, ()))
        for holder, count in common.most_common():
            if count / (len(runs) + self._runs[holder] - count) >= self._alike:
                return self._names[holder]
        for run in runs:
            self._holders[run].append(len(self._runs))
        self._runs.append(len(runs))
        self._names.append(name)
        return None


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    if len(words) <= RUN:
        return {tuple(words)}
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
