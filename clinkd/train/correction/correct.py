"""Which answers are weak, and what becomes of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clinkd.data.boxes import iou, parse_boxes
from clinkd.data.records import Record
from clinkd.errors import DataError
from clinkd.train.correction.facts import sides
from clinkd.train.correction.similarity import Similarity
from clinkd.train.correction.verify import LEAST_SIMILARITY, why_rejected
from clinkd.train.correction.versions import Correction, Status, true_answer, write_round
from clinkd.train.correctors import Case, Corrector, Progress, Reply

__all__ = ["Correction", "Policy", "correct_records", "needs_correction", "write_round"]

Policy = Literal["truth", "keep", "skip"]
_STATUS: dict[Policy, Status] = {"truth": "truth", "keep": "kept", "skip": "skipped"}
_LONGEST_REPLY = 2000  # characters of a rejected reply that are kept to be read


@dataclass(frozen=True, slots=True)
class _Weak:
    record: Record
    answer: str
    truth: str
    similarity: float
    reason: str


def least_iou(answer: str, truth: str, boxes: Sequence[Sequence[float]] = ()) -> float | None:
    """Of all true boxes the least overlap with the answer's best box; None without true boxes.

    Args:
        boxes: the true boxes, for a truth that has none in its text.
    """
    true: Sequence[Sequence[float]] = parse_boxes(truth) or boxes
    found = parse_boxes(answer)
    if not true:
        return None
    return min(max((iou(box, other) for other in found), default=0.0) for box in true)


def needs_correction(
    record: Record,
    answer: str,
    similarity: float,
    threshold: float = 0.8,
    iou_threshold: float = 0.5,
) -> str | None:
    """Why an answer is weak, or None.

    It is where it is less similar to the truth than `threshold` (the paper's 80 %, its number
    included: 0.8 is alike enough); for VG also where a box is missing or one of the true boxes
    overlaps with none of the answer's by `iou_threshold`; and where it speaks of another side,
    which the similarity of sentences does not see.
    """
    truth = true_answer(record)
    if not answer.strip():
        return "no answer"
    if record.task == "VG":
        overlap = least_iou(answer, truth, record.boxes)
        if overlap is not None and not parse_boxes(answer):
            return "no box"
        if overlap is not None and overlap < iou_threshold:
            return f"IoU {overlap:.2f} under {iou_threshold:g}"
    if similarity < threshold:
        return f"similarity {similarity:.2f} under {threshold:g}"
    if sides(answer) != sides(truth):
        return "left and right differ from the truth's"
    return None


def correct_records(
    records: Sequence[Record],
    answers: Mapping[str, str],
    *,
    corrector: Corrector,
    similarity: Similarity,
    threshold: float = 0.8,
    iou_threshold: float = 0.5,
    policy: Policy = "truth",
    least_similarity: float = LEAST_SIMILARITY,
    why_unfit: Callable[[Record], str | None] = lambda _: None,
    progress: Progress | None = None,
) -> list[Correction]:
    """Correct the weak answers among `answers` (record id → the student's text), in record order.

    Args:
        records: with the true answers; those without an answer are passed over.
        policy: what a record becomes where the corrector's reply fails its checks: its `truth`,
            the answer that it has in `records` (`keep`), or nothing (`skip`).
        least_similarity: of a reply with the truth, to be accepted.
        why_unfit: why a record with its new answer cannot be learned from; None where it can.

    Raises:
        DataError: an answer to a record that is not there.
        ConfigError, SetupError: from the corrector, where going on makes no sense.
    """
    known = {record.id for record in records}
    if strange := next((name for name in answers if name not in known), None):
        raise DataError(f"there is an answer to {strange!r}, but no such record")
    weak = _find_weak(records, answers, similarity, threshold, iou_threshold)
    cases = [
        Case(w.record.id, w.record.task, w.record.question, w.answer, w.truth, w.record.images)
        for w in weak
    ]
    replies = corrector.correct(cases, progress) if cases else []
    likeness = similarity([reply.text or "" for reply in replies], [case.truth for case in cases])
    judged = {"corrector": corrector.name, "judge": similarity.name, "threshold": threshold}
    return [
        _correction(w, reply, _why(w, reply, alike, least_similarity, why_unfit), policy, judged)
        for w, reply, alike in zip(weak, replies, likeness, strict=True)
    ]


def _find_weak(
    records: Sequence[Record],
    answers: Mapping[str, str],
    similarity: Similarity,
    threshold: float,
    iou_threshold: float,
) -> list[_Weak]:
    asked = [record for record in records if record.id in answers]
    truths = [true_answer(record) for record in asked]
    scores = similarity([answers[record.id] for record in asked], truths)
    weak = []
    for record, truth, score in zip(asked, truths, scores, strict=True):
        answer = answers[record.id]
        reason = needs_correction(record, answer, score, threshold, iou_threshold)
        if reason is not None:
            weak.append(_Weak(record, answer, truth, score, reason))
    return weak


def _why(
    weak: _Weak,
    reply: Reply,
    alike: float,
    least_similarity: float,
    why_unfit: Callable[[Record], str | None],
) -> str | None:
    if reply.text is None:
        return reply.why or "no reply"
    why = why_rejected(reply.text, weak.truth, alike, least_similarity)
    return why or why_unfit(weak.record.answered(reply.text.strip()))


def _correction(
    weak: _Weak, reply: Reply, why: str | None, policy: Policy, judged: dict[str, Any]
) -> Correction:
    record = weak.record
    overlap = least_iou(weak.answer, weak.truth, record.boxes) if record.task == "VG" else None
    if why is None and reply.text is not None:
        status: Status = "accepted"
        after = reply.text.strip()
    else:
        status = _STATUS[policy]
        after = {"truth": weak.truth, "keep": record.answer, "skip": ""}[policy]
    return Correction(
        id=record.id,
        task=record.task,
        question=record.question,
        image=record.images[0] if len(record.images) == 1 else list(record.images),
        before=weak.answer,
        truth=weak.truth,
        after=after,
        similarity=round(weak.similarity, 4),
        iou=None if overlap is None else round(overlap, 4),
        reason=weak.reason,
        status=status,
        why=why,
        reply=_readable(reply.text) if why is not None else None,
        **judged,
    )


def _readable(reply: str | None) -> str | None:
    """A rejected reply, short, and such that it can be written as UTF-8."""
    if reply is None:
        return None
    return reply[:_LONGEST_REPLY].encode("utf-8", "replace").decode("utf-8")
