"""Word errors between a reference transcript and a recogniser's hypothesis.

Both are normalised first: lower case; any character but letters, digits and apostrophes separates
words; an apostrophe counts only inside a word, because at its edge it may be a quotation mark.
Spellings are not unified: "25" differs from "twenty five", "colour" from "color".
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words(text: str) -> list[str]:
    """Split a text into its normalised words."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Return the numbers of word errors and reference words; ValueError if there are no words."""
    try:
        import jiwer
    except ImportError as error:
        missing = "word error rates need jiwer; run: pip install jiwer (the extra `asr` has it)"
        raise ValueError(missing) from error
    if not (expected := words(reference)):
        raise ValueError(f"the reference {reference!r} has no words, so no error rate")
    counted = jiwer.process_words(" ".join(expected), " ".join(words(hypothesis)))
    return counted.substitutions + counted.deletions + counted.insertions, len(expected)


def error_rate(errors: Sequence[int], num_words: Sequence[int]) -> float:
    """Word error rate in percent over several utterances: sum of errors over sum of words."""
    return 100 * sum(errors) / sum(num_words)
