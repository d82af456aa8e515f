"""What a text states beside its wording: boxes, numbers, sides, opposites, negation.

Sentence encoders hardly see these: "left femur" and "right femur" have a cosine above 0.8. So
they are read off the words. The lists are English; in another language only boxes and numbers are
compared.
"""

import re
import unicodedata
from itertools import pairwise

from clinkd.data.boxes import stated_boxes, strip_boxes

SIDES = frozenset({"left", "right"})
# words of which a text cannot say one where another is true
OPPOSITES: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "left right bilateral",
        "upper lower",
        "superior inferior",
        "anterior posterior",
        "medial lateral",
        "proximal distal",
        "axial coronal sagittal",
        "brighter darker",
        "hyperintense hypointense isointense",
        "hyperdense hypodense isodense",
        "increased decreased unchanged",
        "small medium large",
        "mild moderate severe",
        "acute chronic",
        "benign malignant",
        "normal abnormal",
        "present absent",
    )
)
_NEGATIONS = frozenset({"no", "not", "none", "never", "without", "neither", "nor", "cannot"})
_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)?")
_COUNT_WORDS = "two three four five six seven eight nine ten eleven twelve"  # "one" is a pronoun
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_COUNT_WORDS.split(), start=2)}
_WORD = re.compile(r"[^\W\d_]+(?:['’]t)?")
MARKUP = re.compile(r"<\|[^<>|]{0,40}\|>|</?[a-zA-Z_]{1,20}/?>")


def without_boxes(text: str, mark: str = " ") -> str:
    """The text with `mark` in place of each box, all else left as it is, loose markup too."""
    out, end = [], 0
    for box in stated_boxes(text):
        out += [text[end : box.start], mark]
        end = box.end
    return "".join([*out, text[end:]])


def plain(text: str) -> str:
    """Text without boxes, of one form: compatible characters unified, lower case."""
    return unicodedata.normalize("NFKC", strip_boxes(text)).lower()


def words(text: str) -> list[str]:
    """The words outside boxes, lower case, in order."""
    return _WORD.findall(plain(text))


def numbers(text: str) -> set[str]:
    """Numbers outside boxes, digits or words, in one form: `3.0`, `3` and `three` are the same."""
    text = plain(text)
    digits = {f"{float(n.replace(',', '.')):g}" for n in _NUMBER.findall(text)}
    return digits | {_NUMBER_WORDS[w] for w in _WORD.findall(text) if w in _NUMBER_WORDS}


def sides(text: str) -> frozenset[str]:
    """Which of left and right a text speaks of."""
    return SIDES & set(words(text))


def contradiction(text: str, truth: str) -> str | None:
    """What a text says that the truth rules out, or None.

    A side must be the truth's own, for the text as a whole and for each noun behind it; of opposite
    words none may appear that the truth lacks while it has another of them; and a text negates if,
    and only if, the truth does.
    """
    mine, true = words(text), words(truth)
    if SIDES & set(mine) != SIDES & set(true):
        return f"says {_sides(mine)} where the truth says {_sides(true)}"
    nouns, true_nouns = _sided(mine), _sided(true)
    for noun in nouns.keys() & true_nouns.keys():
        if wrong := nouns[noun] - true_nouns[noun]:
            return f"says '{min(wrong)} {noun}', which the truth does not"
    for group in OPPOSITES:
        said, stated = group & set(mine), group & set(true)
        if stated and (others := said - stated):
            return f"says '{min(others)}' where the truth says '{min(stated)}'"
    if _negates(mine) != _negates(true):
        return "negates what the truth does not, or the other way round"
    return None


def _sides(text_words: list[str]) -> str:
    return " and ".join(f"'{side}'" for side in sorted(SIDES & set(text_words))) or "no side"


def _sided(text_words: list[str]) -> dict[str, set[str]]:
    """Nouns that come with a side: {"femur": {"left"}}."""
    out: dict[str, set[str]] = {}
    for side, noun in pairwise(text_words):
        if side in SIDES and noun not in SIDES:
            out.setdefault(noun, set()).add(side)
    return out


def _negates(text_words: list[str]) -> bool:
    return any(w in _NEGATIONS or w.endswith(("n't", "n’t")) for w in text_words)
