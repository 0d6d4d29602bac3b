"""A queue of requests that arrive at random and are answered one after another, first come, first served."""

import random
from collections.abc import Sequence


def first_tokens(served: Sequence[tuple[float, float]], per_second: float, count: int, seed: int = 0) -> list[float]:
    """Seconds from each request's arrival to its first token, on a virtual clock: nothing sleeps.

    Args:
        served: seconds to the first token and to the end of an answer, as measured; every request takes one of these
            pairs at random.
        per_second: how many of the `count` requests arrive on average, independently of each other.
        seed: of the arrivals and of the pairs, the same for every provider.
    """
    draw = random.Random(seed)
    arrival = free = 0.0
    waits = []
    for _ in range(count):
        arrival += draw.expovariate(per_second)
        first, whole = served[draw.randrange(len(served))]
        begun = max(arrival, free)
        waits.append(begun + first - arrival)
        free = begun + whole
    return waits
