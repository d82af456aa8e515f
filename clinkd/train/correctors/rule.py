"""Correction by rules: the student's wording where it is right, the truth where it is not."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from clinkd.data.boxes import stated_boxes
from clinkd.train.correction.facts import MARKUP, contradiction, without_boxes
from clinkd.train.correctors import Case, Progress, Reply

_SLOT = "\0"  # stands for a box, or several in a row, while sentences are compared
_SENTENCE = re.compile(r"(?<=[.!?])(?<!^[0-9]\.)\s+")  # "1. Liver" is one
_DIGITS = r"[0-9]+(?:[.,-][0-9]+)*"
_TOKEN = re.compile(
    rf"{_SLOT}|[<>≤≥±]\s?[+−-]?{_DIGITS}%?|(?<![\w.])[+−-]{_DIGITS}%?|{_DIGITS}\s?%"
    r"|[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]"
)  # a sign belongs to its number: -20 is not 20
_CLOSED = re.compile(r"[.!?]$")
_VERB_WORDS = "is are was were lies lie shows show contains contain depicts find see has have"
_PLURAL_WORDS = "are were lie show contain have"
_WITH_NAME_WORDS = "is are was were lies lie"  # of one number with what they name, unlike "shows"
_PLURAL_NAME = re.compile(r"(?:[^aius]s|ae|i)$")  # lungs, vertebrae, nuclei; not pelvis, pancreas
_DETERMINER_WORDS = "no both all each every some several many multiple two three four"
_OTHER_WORDS = """
    a an the this that these it its in of at on to and by with as than which there here can be you
    we i one located found seen shown visible situated image picture scan region area box structure
    part given answer
"""
_VERBS = frozenset(_VERB_WORDS.split())
_PLURAL = frozenset(_PLURAL_WORDS.split())
_WITH_NAME = frozenset(_WITH_NAME_WORDS.split())
_DETERMINERS = frozenset(_DETERMINER_WORDS.split())
# words that frame a statement and add nothing to it; all others are its content
_FRAME = _VERBS | frozenset(_OTHER_WORDS.split())
# for want of an article in the truth: a vowel's sound (a urinary bladder), or a letter's name (MR)
_TAKES_AN = re.compile(
    r"(?![Uu](?:ni|ri|re|te)|US\b|[Ee]u)[AEIOUaeiou]|[FHLMNRSX][A-Z]{0,2}(?![A-Za-z])"
)


class RuleCorrector:
    """No model: every sentence of the truth, in the student's words where those can carry it.

    A sentence of the student is kept where its content is that of a sentence of the truth, word
    for word and in order. Where only its content is wrong, the truth's is put into the student's
    wording: "You can find the left femur at …" becomes "You can find the right femur at …". What
    the truth does not say is left out. Boxes are the truth's, always.
    """

    name = "rule"

    def correct(self, cases: Sequence[Case], progress: Progress | None = None) -> list[Reply]:
        out = []
        for number, case in enumerate(cases, start=1):
            out.append(Reply(rewrite(case.answer, case.truth)))
            if progress is not None and (number % 1000 == 0 or number == len(cases)):
                progress(number, len(cases), "correcting")
        return out

    def summary(self) -> str:
        return ""


def rewrite(answer: str, truth: str) -> str:
    """The truth, sentence by sentence, in the answer's words where those can carry it."""
    if any("\n" in truth[box.start : box.end] for box in stated_boxes(truth)):
        return truth
    mine = [_parse(s) for s in _sentences(answer) if _sound(s)]
    return "\n".join(_rewritten(mine, line) for line in truth.split("\n"))


def _rewritten(mine: "list[_Sentence]", line: str) -> str:
    """A line of the truth; the sentences of the student's that it takes up leave `mine`."""
    out, sentences = [], _sentences(line)
    for text in sentences:
        true = _parse(text)
        kept = next((m for m in mine if _agrees(m, true)), None)
        if kept is not None:
            mine.remove(kept)
            out.append(kept.text)
            continue
        wordings = [(m, new) for m in mine if (new := _reworded(m, true)) is not None]
        if wordings:
            used, new = max(wordings, key=lambda pair: _shared_frame(pair[0], true))
            mine.remove(used)
            out.append(new)
        else:
            out.append(text)
    return line if out == sentences else _fill(" ".join(out), _box_texts(line))


class _Run(NamedTuple):
    """Content words in a row, and the frame words or signs around them."""

    start: int
    end: int
    before: str  # empty at the start; `an` counts as `a`
    article: str  # a, an or empty
    after: str = ""


class _Sentence(NamedTuple):
    text: str
    tokens: tuple[str, ...]  # lower case
    runs: tuple[_Run, ...]

    @property
    def content(self) -> list[str]:
        return [t for t in self.tokens if _is_content(t)]

    def run_text(self, run: _Run) -> str:
        return self.text[run.start : run.end]


def _is_content(token: str) -> bool:
    return token not in _FRAME and any(sign.isalnum() for sign in token)


def _parse(text: str) -> _Sentence:
    tokens = []
    runs: list[_Run] = []
    before, inside = "", False
    for match in _TOKEN.finditer(text):
        token = match[0].lower()
        tokens.append(token)
        content = _is_content(token)
        if content and inside:
            runs[-1] = runs[-1]._replace(end=match.end())
        elif content:
            article = before if before in ("a", "an") else ""
            runs.append(_Run(match.start(), match.end(), article[:1] or before, article))
        elif inside:
            runs[-1] = runs[-1]._replace(after=token)
        inside, before = content, token
    return _Sentence(text, tuple(tokens), tuple(runs))


def _sentences(text: str) -> list[str]:
    marked = without_boxes(text.replace(_SLOT, " "), _SLOT)
    marked = re.sub(rf"{_SLOT}(?:\s*{_SLOT})*", _SLOT, marked)
    return [s for s in _SENTENCE.split(" ".join(marked.split())) if s]


def _box_texts(truth: str) -> list[str]:
    """The boxes behind each slot of the truth, as they are written there."""
    truth = truth.replace(_SLOT, " ")
    out: list[str] = []
    end = -1
    for box in stated_boxes(truth):
        if end >= 0 and not truth[end : box.start].strip():
            out[-1] += truth[end : box.end]
        else:
            out.append(truth[box.start : box.end])
        end = box.end
    return out


def _fill(text: str, boxes: Sequence[str]) -> str:
    """Boxes back into their slots, in order."""
    parts = text.split(_SLOT)
    return "".join(
        part + box for part, box in zip(parts, [*boxes, *[""] * len(parts)], strict=False)
    )


def _sound(sentence: str) -> bool:
    """Whether a sentence of the student is fit to be learnt from, as far as signs can tell."""
    tokens = [t.lower() for t in _TOKEN.findall(sentence)]
    stutters = any(a == b and a != _SLOT for a, b in pairwise(tokens))
    return bool(
        _CLOSED.search(sentence)
        and (sentence[0].isupper() or sentence[0].isdigit())
        and not stutters
        and not MARKUP.search(sentence)
        and sentence.count("(") == sentence.count(")")
    )


def _same_build(mine: _Sentence, true: _Sentence) -> bool:
    """As many boxes, no question for a statement, a verb where the truth has one, of one number.

    A truth that is only a name has a number too, that of its first noun: never "It is a lungs.",
    but "It is an image of the lungs."
    """
    verbs, true_verbs = (_VERBS & set(s.tokens) for s in (mine, true))
    numbered, plural = verbs, bool(true_verbs & _PLURAL)
    if not true_verbs:
        name = true.run_text(true.runs[0]).lower() if true.runs else ""
        numbered, plural = verbs & _WITH_NAME, bool(_PLURAL_NAME.search(name))
    return (
        mine.tokens.count(_SLOT) == true.tokens.count(_SLOT)
        and mine.text.endswith("?") <= true.text.endswith("?")
        and bool(verbs) >= bool(true_verbs)
        and (not numbered or bool(numbered & _PLURAL) == plural)
    )


def _agrees(mine: _Sentence, true: _Sentence) -> bool:
    """Whether a sentence of the student says just what one of the truth says."""
    return (
        mine.content == true.content
        and _same_build(mine, true)
        and contradiction(mine.text, true.text) is None
    )


def _reworded(mine: _Sentence, true: _Sentence) -> str | None:
    """The truth's content in the student's frame, or None where the two do not fit together.

    They do with one run of content each; with several where each stands between the same words, so
    that "a CT image of the pelvis" never becomes "a pelvis image of the CT".
    """
    if not mine.runs or len(mine.runs) != len(true.runs) or not _same_build(mine, true):
        return None
    if true.tokens[0] != _SLOT and not true.text[0].isalnum():
        return None  # an item of a list
    pairs = list(zip(mine.runs, true.runs, strict=True))
    if len(pairs) > 1 and any((m.before, m.after) != (t.before, t.after) for m, t in pairs):
        return None
    out, end = [], 0
    for old, new in pairs:
        gap = mine.text[end : old.start]
        run = true.run_text(new)
        articled, needed = (each in ("a", "the") for each in (old.before, new.before))
        if needed > articled or (articled and run.split()[0].lower() in _DETERMINERS):
            return None  # "It is liver.", "This is the no lesion."
        if old.before == "a":
            takes_an = new.article == "an" if new.article else bool(_TAKES_AN.match(run))
            gap = re.sub(r"\b([Aa])n?\s+$", r"\1n " if takes_an else r"\1 ", gap)
        out += [gap, _cased(run, old.start == 0, new.start == 0)]
        end = old.end
    return "".join([*out, mine.text[end:]])


def _cased(run: str, starts: bool, started: bool) -> str:
    """Capital or small first letter, as its new place in the sentence asks; CT, X-ray, T1 stay."""
    if starts:
        return run[0].upper() + run[1:]
    first = run.split()[0].split("-")[0]
    if started and first.isalpha() and first[1:].islower():
        return run[0].lower() + run[1:]
    return run


def _shared_frame(mine: _Sentence, true: _Sentence) -> float:
    """How much of the wording two sentences share, 0…1."""
    first, second = ({t for t in s.tokens if not _is_content(t)} for s in (mine, true))
    return len(first & second) / max(1, len(first | second))
