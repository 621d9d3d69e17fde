"""Word errors: a transcript and what a recogniser heard in, counted errors and word error rates out.

Both texts are compared after one normalisation: lower case; every character that is no letter, digit or apostrophe
separates words; an apostrophe counts inside a word only, since at its edge it cannot be told from a quotation mark.
Nothing else is spelled anew: "25" is not "twenty five", "colour" is not "color".
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text, normalised."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(errors, number of words of the reference): the fewest substitutions, deletions and insertions between the two.

    Raises:
        ValueError: the reference has no words, or jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ValueError("word error rates need jiwer; run: pip install 'sepdist[asr]'") from error
    wanted, heard = words(reference), words(hypothesis)
    if not wanted:
        raise ValueError(f"the reference {reference!r} has no words, so no error rate")
    counted = jiwer.process_words(" ".join(wanted), " ".join(heard))
    return counted.substitutions + counted.deletions + counted.insertions, len(wanted)


def fewest(errors: Sequence[int]) -> int:
    """LibriCSS's choice among the outputs of a separator: the index of the fewest errors, the first of equals."""
    return min(range(len(errors)), key=errors.__getitem__)


def error_rate(errors: Sequence[int], num_words: Sequence[int]) -> float:
    """Percent: the sum of the utterances' errors over the sum of their words."""
    return 100 * sum(errors) / sum(num_words)
