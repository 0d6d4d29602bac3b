"""Keys and values of earlier prompts, by their tokens: a new prompt is computed only from where it differs."""

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..runtime.arguments import byte_limit

# A copy of what a cache keeps between two positions: tensors [a, b, n, d], such as the keys and values [2, heads, n, d]
# of every layer.
Segment = list[torch.Tensor]


@dataclass(eq=False)
class _Node:
    """A run of tokens that follows the tokens of its parents, with its keys and values."""

    tokens: tuple[int, ...] = ()
    segment: Segment = field(default_factory=list)
    parent: "_Node | None" = None
    children: dict[int, "_Node"] = field(default_factory=dict)
    used: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.segment)


class PrefixStore:
    """Trees of token runs, bounded in bytes together, which keep the common beginnings of prompts only once.

    Each scope has a tree of its own, so that nothing of one scope is found in another. The ends that were used longest
    ago are dropped first. Threads may share a store. It keeps copies, and nobody writes into the tensors that it hands
    out.

    Args:
        limit: most bytes of keys and values held; 0 keeps nothing.

    Attributes:
        held_bytes: bytes held now, on all devices together.
    """

    def __init__(self, limit: int):
        self.limit = byte_limit("kv_cache_bytes", limit)
        self.held_bytes = 0
        self._roots: dict[Hashable, _Node] = {}
        self._clock = itertools.count(1)
        self._lock = threading.Lock()

    def longest(self, tokens: Sequence[int], scope: Hashable = None) -> tuple[int, list[Segment]]:
        """The number of first tokens that are known, and their segments in order.

        Args:
            tokens: one whole number for every position; a picture's positions have numbers that only the same picture
                has.
            scope: only what was kept under the same scope is found.
        """
        with self._lock:
            return self._walk(self._roots.get(scope, _Node()), tuple(tokens))[1:]

    def put(self, tokens: Sequence[int], read: Callable[[int, int], Segment], scope: Hashable = None) -> None:
        """Keeps a prompt; the part of it that is already known is not copied again.

        Args:
            tokens: as for `longest`. A prompt that exceeds the limit by itself is not kept.
            read: copies the keys and values between two positions.
            scope: as for `longest`.
        """
        tokens = tuple(tokens)
        with self._lock:
            root = self._roots.get(scope, _Node())
            node, known, segments = self._walk(root, tokens)
            if known == len(tokens) or not self.limit:
                return
            segment = read(known, len(tokens))
            _wait(segment)
            # The known beginning counts as well. If both exceed the limit, everything else would be dropped for this
            # prompt, and then the prompt itself.
            if sum(tensor.nbytes for run in [*segments, segment] for tensor in run) > self.limit:
                return
            if known < (end := self._depth(node)):
                node = self._split(node, len(node.tokens) - (end - known))
            child = _Node(tokens[known:], segment, node, used=next(self._clock))
            node.children[tokens[known]] = child
            self._roots[scope] = root
            self.held_bytes += child.nbytes
            self._make_room(child)

    def clear(self) -> None:
        with self._lock:
            self._roots = {}
            self.held_bytes = 0

    def drop(self, scope: Hashable) -> None:
        """Forgets everything that was kept under a scope."""
        with self._lock:
            if (root := self._roots.pop(scope, None)) is not None:
                self.held_bytes -= sum(node.nbytes for node in _below(root))

    def _walk(self, root: _Node, tokens: tuple[int, ...]) -> tuple[_Node, int, list[Segment]]:
        """The last node that shares any of the tokens, the number of shared tokens, and their segments."""
        node, known, segments = root, 0, []
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
        """The number of tokens from the root to the end of the node."""
        depth = 0
        while node is not None:
            depth, node = depth + len(node.tokens), node.parent
        return depth

    def _split(self, node: _Node, at: int) -> _Node:
        """Cuts a node in two and returns the first half.

        Each half gets memory of its own, because one may be dropped before the other.
        """
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
            # Only ends are dropped, because a run is of no use without its beginning.
            ends = [node for node in self._nodes() if not node.children]
            node = min((end for end in ends if end is not newest), key=lambda end: end.used)
            del node.parent.children[node.tokens[0]]
            self.held_bytes -= node.nbytes

    def _nodes(self) -> Iterator[_Node]:
        return itertools.chain.from_iterable(map(_below, self._roots.values()))


def _below(root: _Node) -> Iterator[_Node]:
    """All nodes below a root."""
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


def _wait(segment: Segment) -> None:
    """Waits until copies on a GPU are complete.

    A thread that finds them, or that gets the memory that was copied, may be on another stream.
    """
    for device in {tensor.device for tensor in segment if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of equal elements at the beginning."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
