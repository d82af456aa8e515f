"""METEOR in Python: exact and stem matches. Called meteor_py, since it is not METEOR.

The jar also matches synonyms and paraphrases and weighs function words; docs/evaluation.md gives
the difference on real captions.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise

from clinkd.errors import SetupError
from clinkd.evaluate.text.ngram import Statistics, Tokens, mean_statistics

# tuned values of METEOR 1.5 for English (Denkowski & Lavie 2014)
ALPHA, BETA, GAMMA = 0.85, 0.2, 0.6
STEM_WEIGHT = 0.6


def meteor_py(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Statistics:
    """Mean over records of the best score over references.

    Raises:
        SetupError: nltk, whose stemmer this uses, is not installed.
    """
    if find_spec("nltk") is None:
        raise SetupError("meteor_py needs nltk: pip install 'clinkd[eval]'")
    return mean_statistics(
        [
            max((_score(hypothesis, ref) for ref in refs), default=0.0)
            for hypothesis, refs in zip(hypotheses, references, strict=True)
        ]
    )


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    from nltk.stem.snowball import EnglishStemmer

    stem: str = EnglishStemmer().stem(word)
    return stem


def _score(hypothesis: Tokens, reference: Tokens) -> float:
    if not hypothesis or not reference:
        return 0.0
    pairs = _align(hypothesis, reference)
    if not pairs:
        return 0.0
    weight = sum(w for _, _, w in pairs)
    precision, recall = weight / len(hypothesis), weight / len(reference)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    chunks = 1 + sum((b[0], b[1]) != (a[0] + 1, a[1] + 1) for a, b in pairwise(pairs))
    if chunks == 1 and len(pairs) == len(hypothesis) == len(reference):
        return mean  # no fragmentation at all
    penalised: float = mean * (1 - GAMMA * (chunks / len(pairs)) ** BETA)
    return penalised


def _align(hypothesis: Tokens, reference: Tokens) -> list[tuple[int, int, float]]:
    """Matched places in the hypothesis's order; ties go on where the last match ended."""
    free = set(range(len(reference)))
    found: dict[int, tuple[int, float]] = {}
    stems = [_stem(word) for word in reference]
    for exact in (True, False):
        for i, word in enumerate(hypothesis):
            if i in found:
                continue
            stem = "" if exact else _stem(word)
            same = [j for j in free if (reference[j] == word if exact else stems[j] == stem)]
            if same:
                expected = found[i - 1][0] + 1 if i - 1 in found else i
                best = min(same, key=lambda j: (abs(j - expected), j))
                found[i] = (best, 1.0 if exact else STEM_WEIGHT)
                free.discard(best)
    return [(i, j, w) for i, (j, w) in sorted(found.items())]
