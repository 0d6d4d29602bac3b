"""A cache of values by key keeps within its limit of bytes."""

from mg_fast.runtime.byte_lru import ByteLRU


def test_what_was_used_longest_ago_goes_first():
    kept = ByteLRU(10)
    for key in "abc":
        kept.put(key, key.upper(), 3)
    assert kept.get("a") == "A"
    kept.put("d", "D", 4)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.get("d")) == (
        "A",
        None,
        "C",
        "D",
    ) and kept.held_bytes == 10


def test_what_is_larger_than_the_limit_drops_nothing():
    kept = ByteLRU(10)
    kept.put("a", 1, 10)
    kept.put("b", 2, 11)
    assert kept.get("a") == 1 and kept.get("b") is None and not kept.fits(11) and ByteLRU(None).fits(2**60)


def test_another_value_under_a_key_is_counted_once():
    kept = ByteLRU(10)
    kept.put("a", 1, 4)
    kept.put("a", 2, 6)
    assert kept.get("a") == 2 and kept.held_bytes == 6 and len(kept) == 1
    kept.put("a", 3, 1, replace=False)
    assert kept.get("a") == 2 and kept.held_bytes == 6
    kept.clear()
    assert kept.get("a") is None and kept.held_bytes == len(kept) == 0


def test_what_is_dropped_by_its_key_is_counted_no_more():
    kept = ByteLRU(10)
    for key, nbytes in ((("one", 1), 2), (("two", 1), 3), (("one", 2), 4)):
        kept.put(key, key, nbytes)
    kept.drop(lambda key: key[0] == "one")
    assert kept.get(("one", 1)) is None and kept.get(("two", 1)) == ("two", 1)
    assert len(kept) == 1 and kept.held_bytes == 3
