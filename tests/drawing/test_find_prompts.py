"""Which texts of an answer are prompts for pictures."""

import logging

import pytest

from mg_fast.drawing import find_prompts

LONG = " ".join(f"word{i}" for i in range(300))
CASES = {
    "no tags": ("A cat.", []),
    "nothing": ("", []),
    "one": ("Here: <h> a red cat </h>", ["a red cat"]),
    "only the prompt": ("<h>a red cat</h>", ["a red cat"]),
    "text after it": ("<h>a cat</h> I hope you like it.", ["a cat"]),
    "two": ("<h>a cat</h> and <h>a dog</h>", ["a cat", "a dog"]),
    "two alike": ("<h>a cat</h><h>a cat</h>", ["a cat", "a cat"]),
    "three": ("<h>a</h><h>b</h>\n<h>c</h>", ["a", "b", "c"]),
    "empty": ("<h></h>", []),
    "only spaces": ("<h>  \n\t </h>", []),
    "empty, then one": ("<h></h> <h>a cat</h>", ["a cat"]),
    "one, then empty": ("<h>a cat</h> <h> </h>", ["a cat"]),
    "unclosed": ("<h>a cat on a", ["a cat on a"]),
    "unclosed and empty": ("well <h>", []),
    "unclosed, only spaces": ("well <h>  \n", []),
    "one, then unclosed": ("<h>a cat</h> <h>a dog", ["a cat", "a dog"]),
    "not opened": ("a cat</h>", []),
    "not opened, then one": ("a</h> b <h>a cat</h>", ["a cat"]),
    "closed twice": ("<h>a cat</h> </h>", ["a cat"]),
    "closed twice, with text": ("<h>a cat</h> a dog</h>", ["a cat"]),
    "opened twice": ("<h>a <h>cat</h>", ["cat"]),
    "opened three times": ("<h><h>a <h>cat</h>", ["cat"]),
    "opened twice, unclosed": ("<h>a <h>cat", ["cat"]),
    "opened at the end again": ("<h>a cat<h>", []),
    "nested": ("<h>a <h>small</h> cat</h>", ["small"]),
    "nested twice": ("<h>a <h>small</h> and <h>red</h> cat</h>", ["small", "red"]),
    "reversed": ("</h>a cat<h>", []),
    "reversed, with text after": ("</h>a cat<h> a dog", ["a dog"]),
    "upper case": ("<H>a cat</H>", []),
    "upper case closes nothing": ("<h>a cat</H> yes", ["a cat</H> yes"]),
    "upper case opens nothing": ("<H>a cat</h>", []),
    "upper case inside": ("<h>a <H>cat</h>", ["a <H>cat"]),
    "other tags": ("<h1>a cat</h1>", []),
    "other tags inside": ("<h>a <b>cat</b></h>", ["a <b>cat</b>"]),
    "spaces in a tag": ("< h>a cat</ h>", []),
    "an attribute": ("<h class='x'>a cat</h>", []),
    "half a tag at the end": ("<h>a cat</h", ["a cat</h"]),
    "half a tag at the beginning": ("h>a cat</h>", []),
    "escaped": ("&lt;h&gt;a cat&lt;/h&gt;", []),
    "inside code": ("```\n<h>a cat</h>\n```", ["a cat"]),
    "inside inline code": ("Write `<h>a cat</h>`.", ["a cat"]),
    "lines": ("<h>\na cat,\nsleeping\n</h>", ["a cat,\nsleeping"]),
    "no spaces around": ("x<h>a</h>y<h>b</h>z", ["a", "b"]),
    "300 words": (f"<h> {LONG} </h>", [LONG]),
    "Chinese": ("好的。<h>一只红色的猫</h>请看。", ["一只红色的猫"]),
    "Chinese and wide spaces": ("<h>\u3000一只猫\u3000</h>", ["一只猫"]),
    "emoji": ("<h>🐈 a cat</h>", ["🐈 a cat"]),
    "quotes": ('<h>"a cat", it said</h>', ['"a cat", it said']),
    "less-than signs": ("<h>a < b > c</h>", ["a < b > c"]),
    "doubled brackets": ("<<h>>a cat<</h>>", [">a cat<"]),
}


@pytest.mark.parametrize("text, expected", CASES.values(), ids=CASES)
def test_prompts(text, expected):
    assert find_prompts(text) == expected


def test_an_open_prompt_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="mg_fast"):
        assert find_prompts("<h>a cat</h> <h> ") == ["a cat"]
        assert not caplog.records
        find_prompts("<h>a cat")
    assert ["the answer ends before" in record.message for record in caplog.records] == [True]
