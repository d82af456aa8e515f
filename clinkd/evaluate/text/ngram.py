"""BLEU, ROUGE-L and CIDEr-D as COCO's evaluation computes them.

Each returns per-record statistics and a function from their sums to the score, so that any group of
records, and any bootstrap resample, is scored without reading texts again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_N = 4
_TINY, _SMALL = 1e-15, 1e-9  # as in pycocoevalcap, against division by zero


@dataclass(frozen=True)
class Statistics:
    """What a metric knows of each record.

    Attributes:
        rows: [N, k].
        finish: sums [..., k] over records → score [...] in 0…1 (CIDEr: 0…10).
    """

    rows: Array
    finish: Callable[[Array], Array]

    def score(self) -> float:
        """Over all records."""
        return float(self.finish(self.rows.sum(axis=0)))


def mean_statistics(values: Sequence[float]) -> Statistics:
    """A metric that is the mean of one value a record."""
    rows = np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)
    return Statistics(rows, _mean)


def _mean(sums: Array) -> Array:
    out: Array = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
    return out


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


Tokens = Sequence[str]


def bleu(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int
) -> Statistics:
    """BLEU-n over a corpus, reference length "closest" (Papineni et al. 2002)."""
    rows = np.zeros((len(hypotheses), 2 * n + 2))
    for i, (hypothesis, refs) in enumerate(zip(hypotheses, references, strict=True)):
        length = len(hypothesis)
        for k in range(1, n + 1):
            rows[i, k - 1] = _clipped(hypothesis, refs, k)
            rows[i, n + k - 1] = max(0, length - k + 1)
        rows[i, -2] = length
        rows[i, -1] = min((abs(len(ref) - length), len(ref)) for ref in refs)[1]
    return _bleu_statistics(rows, n)


def bleu_all(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> list[Statistics]:
    """BLEU-1 … BLEU-4, the n-grams counted once."""
    most = bleu(hypotheses, references, MAX_N).rows
    out = []
    for n in range(1, MAX_N + 1):
        kept = [*range(n), *range(MAX_N, MAX_N + n), 2 * MAX_N, 2 * MAX_N + 1]
        out.append(_bleu_statistics(most[:, kept], n))
    return out


def _clipped(hypothesis: Tokens, references: Sequence[Tokens], k: int) -> int:
    """How many k-grams of the hypothesis a reference has too, each at most as often as it has."""
    counts = _ngrams(hypothesis, k)
    grams = [_ngrams(ref, k) for ref in references]
    return sum(
        min(count, max((g[gram] for g in grams), default=0)) for gram, count in counts.items()
    )


def _bleu_statistics(rows: Array, n: int) -> Statistics:
    def finish(sums: Array) -> Array:
        correct, guess = sums[..., :n], sums[..., n : 2 * n]
        product = ((correct + _TINY) / (guess + _SMALL)).prod(axis=-1)
        ratio = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
        penalty = np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, 1e-12)), 1.0)
        out: Array = product ** (1.0 / n) * penalty
        return out

    return Statistics(rows, finish)


def rouge_l(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2
) -> Statistics:
    """ROUGE-L: F of the longest common subsequence, best precision and recall over references."""
    values = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        common = [_longest_common(hypothesis, ref) for ref in refs]
        precision = max((c / len(hypothesis) for c in common), default=0.0) if hypothesis else 0.0
        pairs = zip(common, refs, strict=True)
        recall = max((c / len(ref) for c, ref in pairs if ref), default=0.0)
        both = precision > 0 and recall > 0
        f = (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if both else 0.0
        values.append(f)
    return mean_statistics(values)


def _longest_common(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for token in a:
        before = 0
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def cider(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0
) -> Statistics:
    """CIDEr-D (Vedantam et al. 2015), document frequencies from these references."""
    frequency: Counter[tuple[str, ...]] = Counter()
    for refs in references:
        grams = [_ngrams(ref, n) for ref in refs for n in range(1, MAX_N + 1)]
        frequency.update(set().union(*grams) if grams else ())
    log_count = log(max(len(references), 1))
    idf = {gram: log_count - log(max(1.0, count)) for gram, count in frequency.items()}
    values = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        mine = _tf_idf(hypothesis, idf, log_count)
        total = np.zeros(MAX_N)
        for ref in refs:
            total += _similarity(mine, _tf_idf(ref, idf, log_count), sigma)
        values.append(10.0 * float(total.mean()) / max(1, len(refs)))
    return mean_statistics(values)


Weighted = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _tf_idf(tokens: Tokens, idf: dict[tuple[str, ...], float], log_count: float) -> Weighted:
    vectors = []
    for n in range(1, MAX_N + 1):
        grams = _ngrams(tokens, n)
        vectors.append({gram: c * idf.get(gram, log_count) for gram, c in grams.items()})
    norms = [sum(v * v for v in vector.values()) ** 0.5 for vector in vectors]
    return vectors, norms, max(0, len(tokens) - 1)  # length counts bigrams, as upstream


def _similarity(a: Weighted, b: Weighted, sigma: float) -> Array:
    gauss = float(np.exp(-((a[2] - b[2]) ** 2) / (2 * sigma**2)))
    out = np.zeros(MAX_N)
    for n, (x, y) in enumerate(zip(a[0], b[0], strict=True)):
        dot = sum(min(value, y.get(gram, 0.0)) * y.get(gram, 0.0) for gram, value in x.items())
        norm = a[1][n] * b[1][n]
        out[n] = gauss * (dot / norm if norm else dot)
    return out
