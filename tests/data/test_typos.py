"""Typing errors: which there are, how many, and that a seed says which letters they hit."""

import numpy as np
import pytest

from headwise.data.typos import check_typos, mistype, mistype_tokens
from tiny import LINES, tokenizer

# What becomes of an "a" that is not swapped.
A = ("q", "w", "s", "z", "aa", "")


def typed(text: str, seeds: int = 200) -> set[str]:
    """What becomes of a text of which every letter is mistyped."""
    return {mistype(text, 1.0, seed=seed) for seed in range(seeds)}


@pytest.mark.parametrize(
    ("letter", "beside"),
    [("q", "wa"), ("p", "ol"), ("z", "asx"), ("m", "njk"), ("g", "tyfhvb"), ("G", "TYFHVB")],
)
def test_a_letter_alone_is_replaced_by_a_neighbour_doubled_or_left_out(letter, beside):
    assert typed(letter) == {*beside, 2 * letter, ""}


def test_a_swap_takes_the_letter_behind_along():
    alone = {first + second for first in A for second in ("g", "h", "v", "n", "bb", "")}
    assert typed("ab", 2000) == alone | {"ba"}


@pytest.mark.parametrize("behind", ["", "1", "ü", " "])
def test_nothing_is_swapped_with_what_is_no_letter(behind):
    assert typed("a" + behind) == {first + behind for first in A}


def test_two_of_the_same_are_not_swapped():
    assert typed("aa", 2000) == {first + second for first in A for second in A}


def test_what_is_no_letter_of_the_keyboard_stays():
    text = "12 + 3 != 4;\n\tü é 蛇 \u212a"
    assert typed(text) == {text}


def test_as_many_letters_are_mistyped_as_was_asked():
    letters = mistype("g " * 10_000, 0.05, seed=0).split(" ")[:-1]
    wrong = [letter for letter in letters if letter != "g"]
    # 500 expected, deviation sqrt(10,000 · 0.05 · 0.95) = 22; of them a third left out.
    assert 400 < len(wrong) < 600
    assert len(wrong) / 4 < wrong.count("") < len(wrong) / 2.4
    assert len(wrong) / 4 < wrong.count("gg") < len(wrong) / 2.4


def test_a_seed_says_which():
    assert mistype(LINES, 0.1, seed=3) == mistype(LINES, 0.1, seed=3)
    assert mistype(LINES, 0.1, seed=3) != mistype(LINES, 0.1, seed=4)
    assert mistype(LINES, 0.0, seed=3) == LINES


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=rf"share is {share}; it must lie in 0..1"):
        mistype("a", share, seed=0)


def test_tokens_are_mistyped_as_the_text_that_they_say():
    bpe = tokenizer(LINES).backend_tokenizer
    text = "line 7\nline ü\n"
    tokens = np.array([*bpe.encode(text).ids, 0], dtype=np.int32)
    assert mistype_tokens(bpe, tokens, 0.0, end=0).tolist() == tokens.tolist()
    *ids, end = mistype_tokens(bpe, tokens, 0.5, end=0).tolist()
    assert end == 0
    assert bpe.decode(ids) == mistype(text, 0.5, seed=0) != text


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.1, 0.0), "typos is 0.0; it must lie in 0..1, both left out"),
        ((1.0,), "typos is 1.0; it must lie in 0..1, both left out"),
        ((float("nan"),), "typos is nan; it must lie in 0..1, both left out"),
        ((0.1, 0.1), r"typos is \(0.1, 0.1\); each entry may occur once"),
    ],
)
def test_shares_that_leave_nothing_to_compare_are_refused(shares, message):
    check_typos("typos", (0.01, 0.1))
    with pytest.raises(ValueError, match=message):
        check_typos("typos", shares)
