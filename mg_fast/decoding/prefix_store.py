"""Keys and values of prompts seen before, by their tokens: a new prompt is computed only from where it differs."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..runtime.arguments import byte_limit

# a copy of the keys and values between two positions: [2, heads, n, d] for every layer
Segment = list[torch.Tensor]


@dataclass(eq=False)
class _Node:
    """A run of tokens after those of its parents, with their keys and values."""

    tokens: tuple[int, ...] = ()
    segment: Segment = field(default_factory=list)
    parent: "_Node | None" = None
    children: dict[int, "_Node"] = field(default_factory=dict)
    used: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.segment)


class PrefixStore:
    """A tree of token runs, bounded in bytes: what prompts have in common is kept once; the ends used longest ago go
    first.

    Threads may share it. It keeps copies, and what it hands out nobody writes into.

    Args:
        limit: most bytes of keys and values held; 0 keeps nothing.

    Attributes:
        held_bytes: bytes held now, on whatever devices they are.
    """

    def __init__(self, limit: int):
        self.limit = byte_limit("kv_cache_bytes", limit)
        self.held_bytes = 0
        self._root = _Node()
        self._clock = itertools.count(1)
        self._lock = threading.Lock()

    def longest(self, tokens: Sequence[int]) -> tuple[int, list[Segment]]:
        """How many of the first tokens are known, and their segments in order.

        Args:
            tokens: one whole number for every position; a picture's positions have numbers that only the same picture
                has.
        """
        with self._lock:
            return self._walk(tuple(tokens))[1:]

    def put(self, tokens: Sequence[int], read: Callable[[int, int], Segment]) -> None:
        """Keeps a prompt; what is known of it already is not copied again.

        Args:
            tokens: as of `longest`; a prompt that is by itself above the limit is not kept.
            read: copies the keys and values between two positions.
        """
        tokens = tuple(tokens)
        with self._lock:
            node, known, segments = self._walk(tokens)
            if known == len(tokens) or not self.limit:
                return
            segment = read(known, len(tokens))
            _wait(segment)
            # with what it begins with: everything else would leave for it, and then itself
            if sum(tensor.nbytes for run in [*segments, segment] for tensor in run) > self.limit:
                return
            if known < (end := self._depth(node)):
                node = self._split(node, len(node.tokens) - (end - known))
            child = _Node(tokens[known:], segment, node, used=next(self._clock))
            node.children[tokens[known]] = child
            self.held_bytes += child.nbytes
            self._make_room(child)

    def clear(self) -> None:
        with self._lock:
            self._root = _Node()
            self.held_bytes = 0

    def _walk(self, tokens: tuple[int, ...]) -> tuple[_Node, int, list[Segment]]:
        """The last node that shares anything with the tokens, how many are shared, and their segments."""
        node, known, segments = self._root, 0, []
        while known < len(tokens) and (child := node.children.get(tokens[known])) is not None:
            shared = _common(child.tokens, tokens[known:])
            child.used = next(self._clock)
            segments.append(
                child.segment if shared == len(child.tokens) else [tensor[:, :, :shared] for tensor in child.segment]
            )
            node, known = child, known + shared
            if shared < len(child.tokens):
                break
        return node, known, segments

    @staticmethod
    def _depth(node: _Node | None) -> int:
        """Tokens from the root to the node's end."""
        depth = 0
        while node is not None:
            depth, node = depth + len(node.tokens), node.parent
        return depth

    def _split(self, node: _Node, at: int) -> _Node:
        """Cuts a node in two, and gives the first. Both get memory of their own: one may leave without the other."""
        head, tail = (
            [tensor[:, :, part].clone() for tensor in node.segment] for part in (slice(None, at), slice(at, None))
        )
        _wait(head)
        first = _Node(node.tokens[:at], head, node.parent, {node.tokens[at]: node}, node.used)
        node.parent.children[node.tokens[0]] = first
        node.tokens, node.segment, node.parent = node.tokens[at:], tail, first
        return first

    def _make_room(self, newest: _Node) -> None:
        while self.held_bytes > self.limit:
            # ends only: without its beginning a run is worth nothing
            ends = [node for node in self._nodes() if not node.children]
            node = min((end for end in ends if end is not newest), key=lambda end: end.used)
            del node.parent.children[node.tokens[0]]
            self.held_bytes -= node.nbytes

    def _nodes(self):
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node


def _wait(segment: Segment) -> None:
    """Until copies on a GPU are made: who finds them, or gets the memory that they were made of, may be on another
    stream.
    """
    for device in {tensor.device for tensor in segment if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many first elements are equal."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
