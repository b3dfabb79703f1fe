"""Splitting long text: nothing lost, nothing changed, every part as long as may be."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxkern.sentences import split_text


@pytest.mark.parametrize(
    ("text", "max_chars", "parts"),
    [
        ("One. Two! Three?", 400, ["One. Two! Three?"]),
        ("One. Two! Three?", None, ["One. Two! Three?"]),
        ("  One. Two. ", 12, ["  One. Two. "]),  # short enough: left alone
        ("One. Two! Three?", 10, ["One. Two!", "Three?"]),
        ("One. Two! Three?", 9, ["One. Two!", "Three?"]),
        ("One. Two! Three?", 8, ["One.", "Two!", "Three?"]),
        ('He said "No." Then he went.', 15, ['He said "No."', "Then he went."]),
        ("It costs 3.50 in all. Yes.", 21, ["It costs 3.50 in all.", "Yes."]),
        ("Wait... what? No", 13, ["Wait... what?", "No"]),
        ("first line\nsecond line", 12, ["first line", "second line"]),
        ("यह एक है। यह दो है।", 10, ["यह एक है।", "यह दो है।"]),
        ("这是一。这是二！「这是三？」完", 5, ["这是一。", "这是二！", "「这是三？」", "完"]),  # no spaces
        ("一、二，三", 2, ["一、", "二，", "三"]),
        ("a, b and c; d. e", 11, ["a, b and c;", "d. e"]),  # too long a sentence: clauses
        ("aa bb cc dd", 5, ["aa bb", "cc dd"]),  # and then words
        ("aaaaaaaa bb", 5, ["aaaaaaaa", "bb"]),  # but no word is cut
    ],
)
def test_parts(text: str, max_chars: int | None, parts: list[str]) -> None:
    assert split_text(text, max_chars) == parts


@given(st.text(st.sampled_from("ab. ,!\n?\"'é。"), max_size=80), st.integers(1, 30))
def test_nothing_is_lost_and_parts_fit(text: str, max_chars: int) -> None:
    parts = split_text(text, max_chars)
    assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", text)
    if len(text) > max_chars:
        for part in parts:
            assert part == part.strip()
            assert len(part) <= max_chars or not re.search(r"\s", part)


def test_no_string() -> None:
    with pytest.raises(TypeError, match="text must be a string, got int"):
        split_text(3, 10)  # type: ignore[arg-type]
