"""Text metrics through one function."""

from collections.abc import Sequence
from functools import lru_cache

from clinkd.evaluate.text.ngram import Statistics, bleu_all, cider, rouge_l
from clinkd.evaluate.text.tokenize import tokenize

METRICS = ("bleu", "rouge_l", "cider", "meteor", "meteor_py", "spice", "scene_graph_f1")


def statistics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]
) -> dict[str, Statistics]:
    """Statistics of each metric; "bleu" gives bleu_1 … bleu_4.

    Raises:
        ValueError: an unknown metric, or hypotheses and references of different number.
        SetupError: what a metric needs is not installed.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} lists of references")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; expected one of {', '.join(METRICS)}")
    if not all(references):
        raise ValueError("every hypothesis needs at least one reference")
    tokens = lru_cache(maxsize=1 << 16)(tokenize)
    words = [tokens(text) for text in hypotheses]
    ref_words = [[tokens(text) for text in refs] for refs in references]
    out: dict[str, Statistics] = {}
    for name in metrics:
        if name == "bleu":
            found = enumerate(bleu_all(words, ref_words), start=1)
            out |= {f"bleu_{n}": each for n, each in found}
        elif name == "rouge_l":
            out[name] = rouge_l(words, ref_words)
        elif name == "cider":
            out[name] = cider(words, ref_words)
        elif name == "meteor_py":
            from clinkd.evaluate.text.meteor_py import meteor_py

            out[name] = meteor_py(words, ref_words)
        elif name == "scene_graph_f1":
            from clinkd.evaluate.text.scene_graph import scene_graph_f1

            out[name] = scene_graph_f1(hypotheses, references)
        elif name == "meteor":
            from clinkd.evaluate.text.jars import meteor

            out[name] = meteor(words, ref_words)
        else:
            from clinkd.evaluate.text.jars import spice

            out[name] = spice(words, ref_words)
    return out


def score(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = ("bleu", "rouge_l", "cider"),
) -> dict[str, float]:
    """Scores of texts against lists of references, 0…1 (CIDEr 0…10).

    The arguments and errors are those of `statistics`.
    """
    found = statistics(hypotheses, references, metrics)
    return {name: each.score() for name, each in found.items()}
