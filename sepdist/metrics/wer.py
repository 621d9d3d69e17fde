"""Word errors between a reference transcript and a recogniser's hypothesis.

Both are normalised first: lower case, NFC; all but letters with their marks (accents, vowel signs),
digits and apostrophes separates words; an apostrophe counts only inside a word, because at its edge
it may be a quotation mark. Spellings are not unified: "25" differs from "twenty five".
"""

import re
from collections.abc import Sequence
from unicodedata import category, normalize

_WORD = re.compile(r"[^\W_][^\s']*(?:'[^\s']+)*")  # where all else is space, as `\w` has no marks


def words(text: str) -> list[str]:
    """Split a text into its normalised words."""
    text = normalize("NFC", text.lower()).replace("\u2019", "'")
    return _WORD.findall("".join(x if x == "'" or category(x)[0] in "LMN" else " " for x in text))


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
