"""PrefixStore finds what was kept, counts its bytes, and drops the ends that were used longest ago first."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mg_fast.decoding import PrefixStore
from tests.fuzzing import fuzz

# Heads and sizes of two layers, and the bytes of one position of their keys and values.
SHAPES = ((1, 2), (2, 3))
POSITION = sum(2 * heads * d * 4 for heads, d in SHAPES)


def reader(tokens):
    """Reads a cache as it is after these tokens, where the keys of a position depend on all tokens up to it."""
    rolling, seen = [], 7
    for token in tokens:
        seen = (seen * 31 + token) % 1_000_003
        rolling.append(float(seen))
    kept = torch.tensor(rolling)

    def read(start, stop):
        return [kept[start:stop, None].expand(2, heads, stop - start, d).clone() for heads, d in SHAPES]

    return read


def joined(segments, layer):
    return torch.cat([segment[layer] for segment in segments], dim=2)


tokens_strategy = st.lists(st.integers(-2, 2), max_size=9).map(tuple)
steps_strategy = st.lists(st.tuples(st.sampled_from(["put", "longest", "clear"]), tokens_strategy), max_size=40)


@fuzz(150)
@given(steps_strategy, st.integers(0, 20))
def test_against_sets_of_prefixes(steps, positions):
    store = PrefixStore(positions * POSITION)
    everything: set[tuple] = set()
    for action, tokens in steps:
        if action == "clear":
            store.clear()
            everything.clear()
        elif action == "put":
            before = kept(store)
            store.put(tokens, reader(tokens))
            everything |= {tokens[: i + 1] for i in range(len(tokens))}
            now = kept(store)
            # Only these tokens are new, and nothing is dropped without need.
            assert now <= before | {tokens[: i + 1] for i in range(len(tokens))}
            if len(before | {tokens[: i + 1] for i in range(len(tokens))}) <= positions:
                assert before <= now and all(tokens[: i + 1] in now for i in range(len(tokens)))
        held = kept(store)
        assert held <= everything
        # Every prefix of a kept prompt is kept, too.
        assert all(entry[:-1] in held for entry in held if len(entry) > 1)
        assert store.held_bytes == len(held) * POSITION <= store.limit
        known, segments = store.longest(tokens)
        assert known == next((i for i in range(len(tokens), 0, -1) if tokens[:i] in held), 0)
        assert bool(segments) == bool(known)
        for layer, expected in enumerate(reader(tokens)(0, known)):
            assert not known or torch.equal(joined(segments, layer), expected)


def kept(store) -> set[tuple]:
    """All prefixes that the tree holds; also checks that each node owns its memory."""
    found = set()

    def walk(node, before):
        for first, child in node.children.items():
            assert child.tokens[0] == first and child.parent is node
            for tensor in child.segment:
                assert tensor.shape[2] == len(child.tokens)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
            found.update(before + child.tokens[: i + 1] for i in range(len(child.tokens)))
            walk(child, before + child.tokens)

    for root in store._roots.values():
        walk(root, ())
    return found


def put(store, *prompts):
    for tokens in prompts:
        store.put(tokens, reader(tokens))


def known(store, tokens):
    return store.longest(tokens)[0]


def test_the_ends_used_longest_ago_leave_first():
    store = PrefixStore(9 * POSITION)
    a, b, c = (1, 1, 1), (2, 2, 2), (3, 3, 3)
    put(store, a, b, c)
    # `a` is asked for again, so that `b` is now the oldest.
    store.longest(a)
    put(store, (4, 4, 4))
    assert [known(store, tokens) for tokens in (b, c, a, (4, 4, 4))] == [0, 3, 3, 3]
    # Of the rest, `c` was asked for first: it is dropped, and two tokens take its place.
    put(store, (5, 5))
    assert [known(store, tokens) for tokens in (c, a, (4, 4, 4), (5, 5))] == [0, 3, 3, 2]


def test_a_common_beginning_outlives_its_ends():
    store = PrefixStore(8 * POSITION)
    put(store, (1, 1, 1, 2, 2), (1, 1, 1, 3, 3))
    assert store.held_bytes == 7 * POSITION
    put(store, (9, 9))
    # The end used longest ago was dropped; the common beginning is still needed by the other end.
    assert known(store, (1, 1, 1, 2, 2)) == 3 and known(store, (1, 1, 1, 3, 3)) == 5
    assert store.held_bytes == 7 * POSITION


def test_half_of_a_split_run_frees_its_bytes():
    store = PrefixStore(6 * POSITION)
    put(store, (1, 1, 1, 2, 2))
    whole = [weakref.ref(tensor) for node in store._nodes() for tensor in node.segment]
    put(store, (1, 1, 1, 3))
    gc.collect()
    # The tensors of the whole run are gone, and their memory with them.
    assert not any(reference() is not None for reference in whole)
    store.longest((1, 1, 1, 3))
    put(store, (9, 9))
    assert kept(store) == {(1,), (1, 1), (1, 1, 1), (1, 1, 1, 3), (9,), (9, 9)}
    assert store.held_bytes == 6 * POSITION


def test_what_cannot_be_kept_throws_nothing_out():
    store = PrefixStore(6 * POSITION)
    put(store, (1, 1, 1), (2, 2))
    # The first prompt is too long by itself, the second together with its known beginning.
    put(store, (3,) * 7, (1, 1, 1, 4, 4, 4, 4))
    assert known(store, (1, 1, 1)) == 3 and known(store, (2, 2)) == 2


def test_known_tokens_are_not_read_again():
    store = PrefixStore(100 * POSITION)
    read = []
    store.put((1, 2, 3), lambda start, stop: read.append((start, stop)) or reader((1, 2, 3))(start, stop))
    store.put((1, 2, 3, 4), lambda start, stop: read.append((start, stop)) or reader((1, 2, 3, 4))(start, stop))
    store.put((1, 2), lambda start, stop: read.append((start, stop)))
    assert read == [(0, 3), (3, 4)]


def test_what_was_handed_out_stays_when_it_leaves():
    store = PrefixStore(3 * POSITION)
    put(store, (1, 2, 3))
    length, segments = store.longest((1, 2, 9))
    put(store, (1, 7), (4, 4, 4))
    store.clear()
    assert length == 2 and torch.equal(joined(segments, 1), reader((1, 2))(0, 2)[1])


@pytest.mark.parametrize("limit", [-1, 0.5, "1"])
def test_limits_that_are_none(limit):
    with pytest.raises((ValueError, TypeError)):
        PrefixStore(limit)


def test_a_store_of_nothing():
    store = PrefixStore(0)
    store.put((1, 2), lambda start, stop: pytest.fail("read for nothing"))
    assert store.longest((1, 2)) == (0, []) and store.held_bytes == 0


def test_a_scope_finds_only_what_is_its_own():
    tokens = (1, 2, 3)
    store = PrefixStore(7 * POSITION)
    for scope in ("one", "two"):
        store.put(tokens, reader(tokens), scope)
    assert [store.longest(tokens, scope)[0] for scope in ("one", "two", "three", None)] == [3, 3, 0, 0]
    assert store.held_bytes == 6 * POSITION
    # Room is made in all scopes alike: the end that was used longest ago is dropped.
    store.longest(tokens, "one")
    store.put((9, 9), reader((9, 9)))
    assert [store.longest(tokens, scope)[0] for scope in ("one", "two")] == [3, 0]
    store.drop("one")
    store.drop("never kept")
    assert store.longest(tokens, "one")[0] == 0 and store.longest((9, 9))[0] == 2
    assert store.held_bytes == 2 * POSITION
