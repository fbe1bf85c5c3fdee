"""Metrics of running text: how much of a reference another text shares, in any script.

All are in [0, 1], and a mean over examples. Of a text longer than 20,000 characters they see the
start, which bounds time and memory for whatever a model writes.
"""

import collections
import functools
import re
import string
import unicodedata
from collections.abc import Sequence

from distill.metrics.statistics import Examples, mean_per_example

_MAX_CHARACTERS = 20_000
# Scripts that put no space between words: Thai, Lao, Myanmar, Khmer, Kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def words(text: str) -> list[str]:
    """Returns the words of a text, for overlap metrics.

    Unicode NFKC, case folded; a word is a run of letters, marks and digits, everything else
    separates. In scripts without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) each character is a
    word. On ASCII text that is the tokenizer of Google's `rouge_score` without stemming.
    """
    text = _folded(text)
    return _split("".join([c if _is_word(c) else " " for c in text]))


def _folded(text: str) -> str:
    # Cut again: NFKC makes up to 18 characters of one.
    return unicodedata.normalize("NFKC", text[:_MAX_CHARACTERS])[:_MAX_CHARACTERS].casefold()


def _split(text: str) -> list[str]:
    return _UNSPACED.sub(r" \g<0> ", text).split()


@functools.lru_cache(maxsize=4096)
def _is_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


@functools.lru_cache(maxsize=4096)
def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


@mean_per_example
def rouge_l(targets: Sequence[str], predictions: Sequence[str]) -> Examples:
    """The mean sentence-level ROUGE-L F1 (Lin 2004, section 3.1, with beta = 1).

    The longest common subsequence of the two texts' `words`; precision is its length over that of
    the prediction, recall over that of the target. 0 where either has no words. On ASCII text it is
    `rougeL` of `rouge_score` without stemming, which scores texts in other scripts 0.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    values = []
    for target, prediction in zip(targets, predictions, strict=True):
        a, b = words(target), words(prediction)
        values.append(2 * _common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0)
    return {"rouge_l": values}


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, len(a) bits at a time (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    everywhere = (1 << len(a)) - 1
    # Bit i is 0 where the subsequence grows at a[i]: one row of the usual table.
    row = everywhere
    for word in b:
        here = row & places.get(word, 0)
        row = (row + here | row - here) & everywhere
    return len(a) - row.bit_count()


@mean_per_example
def chrf(targets: Sequence[str], predictions: Sequence[str]) -> Examples:
    """The mean sentence-level chrF2 (Popović 2015), by sacrebleu with its defaults.

    Character 1- to 6-grams without whitespace, beta = 2; no tokenizer, so that it needs nothing of
    a script. sacrebleu's number divided by 100. Sentence level, because rationales are independent
    examples: the corpus level, which pools the n-grams of all, would weigh long ones more.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    score = _chrf().sentence_score
    return {
        "chrf": [
            score(p[:_MAX_CHARACTERS], [t[:_MAX_CHARACTERS]]).score / 100
            for t, p in zip(targets, predictions, strict=True)
        ]
    }


@functools.cache
def _chrf():
    # 0.1 s, which only evaluations of rationales need.
    from sacrebleu import metrics

    return metrics.CHRF()


@mean_per_example
def token_f1(targets: Sequence[str], predictions: Sequence[str]) -> Examples:
    """The mean token F1 of SQuAD (Rajpurkar et al. 2016), for short free-text answers.

    The words that two answers share, in any order, each as often as in both. Words are those
    between whitespace after lower-casing (Unicode NFKC, case folded), removing punctuation and the
    English articles; in scripts without spaces each character is one. Where an answer has no words,
    1 if the other has none either, else 0. On ASCII text that is SQuAD's own script.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    values = []
    for target, prediction in zip(targets, predictions, strict=True):
        a, b = _answer_words(target), _answer_words(prediction)
        common = sum((collections.Counter(a) & collections.Counter(b)).values())
        values.append(2 * common / (len(a) + len(b)) if a and b else float(a == b))
    return {"token_f1": values}


def _answer_words(text: str) -> list[str]:
    plain = "".join([c for c in _folded(text) if not _is_punctuation(c)])
    return _split(_ARTICLES.sub(" ", plain))
