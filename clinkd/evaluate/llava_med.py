"""LLaVA-Med's small test set (`llava_med_eval_qa50_qa.jsonl`, "qa0.2k"): its files, n-gram scores.

The published file has 193 questions on 50 figures: 143 conversation, 50 detailed description.
Scores on it depend on how long an answer may be, so every result states the limit and the lengths
found.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinkd.data.records import scan_lines
from clinkd.errors import DataError
from clinkd.evaluate.text import score

QUESTIONS = 193  # of the published file
_IMAGE = "<image>"
_ANSWER_KEYS = ("text", "response", "answer")


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the set, its reference answer, and what a judge without eyes may read.

    Attributes:
        kind: `conversation` or `detailed_description`.
        domain: `chest_xray`, `mri`, `ct_scan`, `histology` or `gross`.
        caption: of the figure; `mention`: what the paper's text says of it.
    """

    id: str
    text: str
    reference: str
    kind: str
    domain: str
    caption: str = ""
    mention: str = ""


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read the set's file of questions.

    Raises:
        DataError: the file and line at fault, and why.
    """
    out: dict[str, Question] = {}
    for number, value in scan_lines(path):
        try:
            if isinstance(value, DataError):
                raise value
            question = _question(value)
            if question.id in out:
                raise DataError(f"question_id {question.id} comes twice")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        out[question.id] = question
    if not out:
        raise DataError(f"{path}: no questions")
    return list(out.values())


def _question(value: Any) -> Question:
    if not isinstance(value, dict) or "question_id" not in value:
        raise DataError("must be an object with a 'question_id'")
    for key in ("text", "gpt4_answer", "type"):
        if not isinstance(value.get(key), str) or not value[key]:
            raise DataError(f"'{key}' must be a text, got {value.get(key)!r}")
    domains = value.get("domain")
    if not isinstance(domains, dict) or sum(map(bool, domains.values())) != 1:
        raise DataError(f"'domain' must have one key that is true, got {domains!r}")
    mention = value.get("in_text_mention") or ""
    return Question(
        id=str(value["question_id"]),
        text=value["text"].removesuffix(_IMAGE).removeprefix(_IMAGE).strip(),
        reference=value["gpt4_answer"],
        kind=value["type"],
        domain=next(name for name, mine in domains.items() if mine),
        caption=str(value.get("fig_caption") or ""),
        mention=" ".join(map(str, mention)) if isinstance(mention, list) else str(mention),
    )


def read_answers(path: str | os.PathLike[str], questions: Sequence[Question]) -> list[str]:
    """A model's answers in the order of the questions.

    Lines hold `question_id` and the answer as `text` (LLaVA-Med's own), `response` or `answer`.

    Raises:
        DataError: a line at fault, an answer to no question, or a question without answer.
    """
    known = {question.id for question in questions}
    found: dict[str, str] = {}
    for number, value in scan_lines(path):
        try:
            if isinstance(value, DataError):
                raise value
            name, text = _answer(value)
            if name not in known:
                raise DataError(f"question_id {name} is none of the set's")
            if name in found:
                raise DataError(f"question_id {name} comes twice")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        found[name] = text
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        shown = ", ".join(missing[:3])
        raise DataError(f"{path}: no answer to {len(missing)} questions, as {shown}")
    return [found[question.id] for question in questions]


def _answer(value: Any) -> tuple[str, str]:
    if not isinstance(value, dict) or "question_id" not in value:
        raise DataError("must be an object with a 'question_id'")
    text = next((value[key] for key in _ANSWER_KEYS if isinstance(value.get(key), str)), None)
    if text is None:
        raise DataError(f"must hold the answer as {', '.join(_ANSWER_KEYS[:-1])} or answer")
    return str(value["question_id"]), text


def parts(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Places of the questions: all, by kind, by domain."""
    out: dict[str, list[int]] = {"all": list(range(len(questions)))}
    for field in ("kind", "domain"):
        for name in sorted({getattr(question, field) for question in questions}):
            out[name] = [i for i, q in enumerate(questions) if getattr(q, field) == name]
    return out


def by_part(
    questions: Sequence[Question], measure: Callable[[list[int]], Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """`measure` of the places of each part, and its number of questions."""
    return {
        name: {"n": len(places), **measure(places)} for name, places in parts(questions).items()
    }


def lengths(answers: Sequence[str], max_new_tokens: int) -> dict[str, float]:
    """What has to stand beside every score: the limit, and the words of the answers."""
    words = [len(text.split()) for text in answers]
    return {
        "max_new_tokens": max_new_tokens,
        "mean_words": round(float(np.mean(words)), 1),
        "most_words": max(words),
    }


def ngram_scores(
    questions: Sequence[Question], answers: Sequence[str], *, max_new_tokens: int, meteor: str
) -> dict[str, Any]:
    """BLEU-1…4, METEOR, ROUGE-L and their mean (mBMR) in percent: all, by kind, by domain.

    Args:
        max_new_tokens: the limit that the answers were made with; it is only stated.
        meteor: `meteor` or `meteor_py`; the mean is named after it.
    """

    def measure(places: list[int]) -> dict[str, float]:
        found = score(
            [answers[i] for i in places],
            [[questions[i].reference] for i in places],
            ["bleu", meteor, "rouge_l"],
        )
        mean = "mbmr" if meteor == "meteor" else "mbmr_meteor_py"
        found[mean] = float(np.mean(list(found.values())))
        return {name: round(100 * value, 2) for name, value in found.items()}

    return {
        "length": lengths(answers, max_new_tokens),
        "complete": len(questions) == QUESTIONS,
        "scores": by_part(questions, measure),
    }
