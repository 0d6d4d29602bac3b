"""The order in which samples are trained on: at random, and if asked for in steps of one kind."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Stands in an order where no sample is left, so that all processes have a batch.
EMPTY = -1


class SampleOrder(Sampler[int]):
    """An order for each epoch, which depends only on the seed and the epoch, so that a run can continue in it.

    Args:
        lengths: of all samples, above 0 with pictures and below 0 without (`FineTuneData.lengths`).
        size: the samples of one process in one pass.
        passes: the passes of one step: processes times accumulation. A step has `size * passes` samples.
        seed: of the order.
        grouped: let a step have samples with pictures or samples without, and deal them to its passes so that these
            are about as long as each other. Otherwise the order is random.
        processes: the passes that are made at the same time. `EMPTY` fills up the last of them. Otherwise accelerate
            would fill up by samples from the epoch's beginning, which then weighed twice.
    """

    def __init__(self, lengths: Sequence[int], size: int, passes: int, *, seed: int, grouped: bool, processes: int = 1):
        self._empty = -len(lengths) % (size * processes) if processes > 1 else 0
        self.lengths, self.size, self.passes = [int(length) for length in lengths], size, passes
        self.seed, self.grouped, self.epoch = seed, grouped, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self._empty

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        if self.grouped:
            order = grouped_order(self.lengths, self.size, self.passes, generator)
        else:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return iter(order + [EMPTY] * self._empty)


def grouped_order(lengths: Sequence[int], size: int, passes: int, generator: torch.Generator) -> list[int]:
    """An order in which the samples of a step are alike: all with pictures or all without.

    Each kind is shuffled and cut into steps. Within a step the samples are dealt to the passes by length, so that all
    processes have about as much to do. Steps are shuffled; what is left of both kinds comes last.

    Args:
        lengths: above 0 with pictures, below 0 without.
        size, passes: as in `SampleOrder`.
        generator: of the random numbers.
    """
    step, steps, left = size * passes, [], []
    with_pictures = [i for i, length in enumerate(lengths) if length > 0]
    without = [i for i, length in enumerate(lengths) if length <= 0]
    for kind in (with_pictures, without):
        shuffled = [kind[i] for i in torch.randperm(len(kind), generator=generator).tolist()]
        whole = len(shuffled) - len(shuffled) % step
        steps += [shuffled[at : at + step] for at in range(0, whole, step)]
        left += shuffled[whole:]
    order = []
    for number in torch.randperm(len(steps), generator=generator).tolist():
        order += [i for hand in _dealt(steps[number], lengths, size, passes) for i in hand]
    return order + left


def _dealt(step: Sequence[int], lengths: Sequence[int], size: int, passes: int) -> list[list[int]]:
    """The samples of a step in `passes` hands of `size`, the longest first, each to the hand that has least."""
    hands: list[list[int]] = [[] for _ in range(passes)]
    totals = [0] * passes
    for i in sorted(step, key=lambda i: (-abs(lengths[i]), i)):
        hand = min((h for h in range(passes) if len(hands[h]) < size), key=totals.__getitem__)
        hands[hand].append(i)
        totals[hand] += abs(lengths[i])
    return hands
