"""Word errors against counts made by hand and by a textbook recursion."""

import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepdist.metrics.wer import error_rate, word_errors, words


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "num_words"),
    [
        ("THE CAT SAT", "the cat sat", 0, 3),
        ("THE CAT SAT", "The cat, sat.", 0, 3),
        ("THE CAT SAT", "the hat sat", 1, 3),  # one substitution
        ("THE CAT SAT", "the sat", 1, 3),  # one deletion
        ("THE CAT SAT", "the the cat sat down", 2, 3),  # two insertions
        ("THE CAT SAT", "", 3, 3),  # all deleted
        ("THE CAT SAT", " ... ", 3, 3),
        ("YES", "no no no", 3, 1),  # more errors than words: one substituted, two inserted
        ("TWENTY FIVE", "25", 2, 2),  # nothing is spelled anew
        ("WELL KNOWN", "well-known", 0, 2),
        ("DON'T SAY 'TIS", "Don\u2019t say tis", 0, 3),
        ("DON'T", "dont", 1, 1),
    ],
)
def test_errors_are_those_counted_by_hand(
    reference: str, hypothesis: str, errors: int, num_words: int
) -> None:
    assert word_errors(reference, hypothesis) == (errors, num_words)


TEXTS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@given(TEXTS.filter(len), TEXTS)
def test_errors_are_the_edit_distance_of_the_words(
    reference: list[str], hypothesis: list[str]
) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        change = distance(i - 1, j - 1) + (reference[i - 1] != hypothesis[j - 1])
        return min(change, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    expected = distance(len(reference), len(hypothesis))
    assert word_errors(" ".join(reference), " ".join(hypothesis)) == (expected, len(reference))


def test_words_are_lower_case_without_punctuation_and_keep_apostrophes_inside() -> None:
    assert words("«Ça va?» -- O'Neill's 'boat'; U.S._x 3rd") == [
        "ça",
        "va",
        "o'neill's",
        "boat",
        "u",
        "s",
        "x",
        "3rd",
    ]


def test_accents_and_vowel_signs_belong_to_their_word_however_they_are_encoded() -> None:
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"  # six letters and signs, one word
    assert words(f"{hindi}, {hindi}!") == [hindi, hindi]
    assert word_errors(hindi, hindi.replace("\u0940", "\u093e")) == (1, 1)  # another vowel
    assert word_errors("e\u0301te\u0301", "\u00e9t\u00e9") == (0, 1)
    assert words("\u0301 a\ufe0f") == ["a\ufe0f"]  # a mark alone is no word


def test_the_rate_of_a_condition_is_of_its_sums_and_not_the_mean_of_the_rates() -> None:
    assert error_rate([1, 0, 5], [2, 3, 5]) == pytest.approx(60.0)  # the mean would be 50


def test_a_reference_without_words_and_a_missing_package_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="no words"):
        word_errors("...", "yes")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ValueError, match="the extra `asr`"):
        word_errors("yes", "yes")
