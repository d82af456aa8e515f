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
_COMPARISONS = frozenset("<>≤≥")
# with its sign and its unit: 20 is not -20, < 5 not > 5, 3 mm not 3 cm
_NUMBER = re.compile(
    r"([<>≤≥]?)\s*((?<![\w.)%])(?:[-−]|minus\s))?([0-9]+(?:[.,][0-9]+)?|(?<!\w)\.[0-9]+)"
    r"(?:[\s-]*(%|(?:mm|cm|m|ml|cc|l|mg|g|kg|hu)\b))?"
)
_COUNT_WORDS = """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
"""  # "one" is a pronoun
_ORDINALS = "second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_ROMAN = "ii iii iv v vi vii viii ix"
_TENS = "thirty forty fifty sixty seventy eighty ninety hundred"
_NUMBER_WORDS = {
    word: str(value)
    for row in (_COUNT_WORDS, _ORDINALS, _ROMAN)
    for value, word in enumerate(row.split(), start=2)
} | {word: str(10 * value) for value, word in enumerate(_TENS.split(), start=3)}
# another lesion, v. cava, an i.v. line: no numbers
_NO_NUMBER = re.compile(
    r"\ba second\b|(?<!stage )(?<!grade )(?<!type )(?<!class )(?<!segment )(?<!nerve )\bi?v\b"
)
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


def numbers(text: str) -> dict[str, set[str]]:
    """Numbers outside boxes, digits or words, in one form: `3.0`, `3` and `three` are the same.

    With each, the signs of comparison before it and the units behind it.
    """
    text = _NO_NUMBER.sub(" ", plain(text))
    found: dict[str, set[str]] = {
        _NUMBER_WORDS[word]: set() for word in _WORD.findall(text) if word in _NUMBER_WORDS
    }
    for compared, sign, digits, unit in _NUMBER.findall(text):
        value = f"{'-' * bool(sign)}{float(digits.replace(',', '.')):.15g}"
        found.setdefault(value, set()).update({compared, unit} - {""})
    return found


def new_numbers(text: str, truth: str) -> set[str]:
    """Numbers of a text that its truth lacks, or has with another sign of comparison or unit.

    Where only one of the two has such a mark the other may say it in words: less than 5, percent.
    """
    mine, true = numbers(text), numbers(truth)
    new = mine.keys() - true.keys()
    for value in mine.keys() & true.keys():
        for mark in mine[value] - true[value]:
            if any((mark in _COMPARISONS) == (other in _COMPARISONS) for other in true[value]):
                new.add(f"{value} {mark}")
    return new


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
