"""Which answers are weak, what becomes of them, and the new version of the data."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from clinkd.data.boxes import iou, parse_boxes
from clinkd.data.files import write_jsonl
from clinkd.data.records import Record, Turn, write_records
from clinkd.train.correction.similarity import Similarity
from clinkd.train.correction.verify import why_rejected
from clinkd.train.correctors import Case, Corrector

Policy = Literal["truth", "keep", "skip"]
Progress = Callable[[int, int, str], None]
BATCH = 32  # cases sent to the corrector at a time


@dataclass(frozen=True)
class Correction:
    """One weak answer and what became of it.

    Attributes:
        similarity: of the student's answer with the truth.
        iou: VG: least IoU of a true box with the best box of the answer; else None.
        reason: why it was corrected.
        status: accepted, truth (the reply failed its checks), kept or skipped.
        why: which check the reply failed.
    """

    id: str
    task: str
    question: str
    image: str | list[str]
    before: str
    truth: str
    after: str
    similarity: float
    iou: float | None
    reason: str
    status: str
    why: str | None
    corrector: str
    judge: str


def least_iou(answer: str, truth: str) -> float | None:
    """Of all true boxes the least overlap with the answer's best box; None without true boxes."""
    boxes = parse_boxes(truth)
    found = parse_boxes(answer)
    if not boxes:
        return None
    return min(max((iou(box, other) for other in found), default=0.0) for box in boxes)


def needs_correction(
    record: Record, answer: str, similarity: float, threshold: float, iou_threshold: float
) -> str | None:
    """Why an answer is weak, or None: too unlike the truth, or VG with a box missing or off."""
    if record.task == "VG":
        if not parse_boxes(answer):
            return "no box"
        overlap = least_iou(answer, record.answer)
        if overlap is not None and overlap < iou_threshold:
            return f"IoU {overlap:.2f} under {iou_threshold}"
    if similarity < threshold:
        return f"similarity {similarity:.2f} under {threshold}"
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
    progress: Progress | None = None,
) -> list[Correction]:
    """Correct the weak answers among `answers` (record id → the student's text).

    Args:
        policy: what a record becomes where the corrector's reply fails its checks: the `truth`, the
            student's answer (`keep`), or nothing (`skip`).
    """
    asked = [record for record in records if record.id in answers]
    scores = similarity([answers[r.id] for r in asked], [r.answer for r in asked])
    weak: list[tuple[Record, str, float, str]] = []
    for record, score in zip(asked, scores, strict=True):
        answer = answers[record.id]
        reason = needs_correction(record, answer, score, threshold, iou_threshold)
        if reason is not None:
            weak.append((record, answer, score, reason))
    out: list[Correction] = []
    for start in range(0, len(weak), BATCH):
        part = weak[start : start + BATCH]
        cases = [Case(r.id, r.task, r.question, answer, r.answer) for r, answer, _, _ in part]
        replies = corrector.correct(cases)
        likeness = similarity([reply or "" for reply in replies], [case.truth for case in cases])
        for (record, answer, score, reason), reply, alike in zip(
            part, replies, likeness, strict=True
        ):
            why = "no reply" if reply is None else why_rejected(reply, record.answer, alike)
            status, after = _outcome(policy, why, reply, answer, record.answer)
            out.append(
                Correction(
                    id=record.id,
                    task=record.task,
                    question=record.question,
                    image=record.images[0] if len(record.images) == 1 else list(record.images),
                    before=answer,
                    truth=record.answer,
                    after=after,
                    similarity=round(score, 4),
                    iou=_rounded(least_iou(answer, record.answer), record.task),
                    reason=reason,
                    status=status,
                    why=why,
                    corrector=corrector.name,
                    judge=similarity.name,
                )
            )
        if progress is not None:
            progress(start + len(part), len(weak), "correcting")
    return out


def _rounded(value: float | None, task: str) -> float | None:
    return None if value is None or task != "VG" else round(value, 4)


def _outcome(
    policy: Policy, why: str | None, reply: str | None, before: str, truth: str
) -> tuple[str, str]:
    if why is None and reply is not None:
        return "accepted", reply
    return {"truth": ("truth", truth), "keep": ("kept", before), "skip": ("skipped", "")}[policy]


def write_round(
    folder: str | Path, records: Sequence[Record], corrections: Sequence[Correction]
) -> None:
    """Write a new version of the data: corrected answers in place, where from beside them.

    `data.jsonl` comes last: where it is, the round is whole.
    """
    folder = Path(folder)
    write_jsonl(folder / "corrections.jsonl", (asdict(c) for c in corrections))
    by_id = {correction.id: correction for correction in corrections}
    new: list[Record] = []
    for record in records:
        correction = by_id.get(record.id)
        if correction is None:
            new.append(record)
        elif correction.status != "skipped":
            origin = {
                name: getattr(correction, name)
                for name in ("status", "reason", "why", "corrector", "judge", "similarity", "truth")
            }
            turns = (*record.conversations[:-1], Turn("gpt", correction.after))
            extra = record.extra | {"correction": json.loads(json.dumps(origin))}
            new.append(replace(record, conversations=turns, extra=extra))
    write_records(folder / "data.jsonl", new)
