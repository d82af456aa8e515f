"""A round of corrections on disk: a new version of the data, never changed afterwards."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clinkd.data.files import write_jsonl
from clinkd.data.records import Record
from clinkd.errors import DataError

PROVENANCE = "correction"  # key of a record's extra that says where its answer is from
Status = Literal["accepted", "truth", "kept", "skipped"]
_INSTEAD = {"truth": "the truth instead", "kept": "kept as they were", "skipped": "left out"}
_ORIGIN = ("status", "reason", "why", "similarity", "corrector", "judge", "threshold", "truth")


@dataclass(frozen=True, slots=True)
class Correction:
    """One weak answer and what became of it; a line of corrections.jsonl.

    Attributes:
        before: the student's answer.
        after: what is learnt from instead; empty where the record is left out.
        similarity: of the student's answer with the truth.
        iou: VG: of all true boxes the least overlap with the answer's best box; else None.
        reason: why it was corrected.
        status: accepted, or what the policy made of it: truth, kept, skipped.
        why: the check that the corrector's reply failed, or why there was no reply.
        reply: the reply that failed.
        threshold: answers less similar were corrected.
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
    status: Status
    why: str | None
    reply: str | None
    corrector: str
    judge: str
    threshold: float


def true_answer(record: Record) -> str:
    """The true answer, of a record that was corrected in an earlier round as well."""
    origin = record.extra.get(PROVENANCE)
    truth = origin.get("truth") if isinstance(origin, dict) else None
    return truth.strip() if isinstance(truth, str) else record.answer


def apply_corrections(records: Sequence[Record], corrections: Sequence[Correction]) -> list[Record]:
    """The records with corrected answers, and where those are from in `extra["correction"]`.

    A record without a correction stays as it is; one whose correction is `skipped` is left out.

    Raises:
        DataError: a correction of a record that is not there, or two of one record.
    """
    by_id = {correction.id: correction for correction in corrections}
    if len(by_id) != len(corrections):
        raise DataError("two corrections of one record")
    if strange := sorted(by_id.keys() - {record.id for record in records}):
        raise DataError(f"there is a correction of {strange[0]!r}, but no such record")
    out = []
    for record in records:
        correction = by_id.get(record.id)
        if correction is None:
            out.append(record)
        elif correction.status != "skipped":
            extra = record.extra | {PROVENANCE: _origin(correction)}
            out.append(replace(record.answered(correction.after), extra=extra))
    return out


def _origin(correction: Correction) -> dict[str, Any]:
    return {name: getattr(correction, name) for name in _ORIGIN}


def count_statuses(statuses: Sequence[str]) -> str:
    """How many weak answers were corrected, and what became of the others, in a few words."""
    count = Counter(statuses)
    others = [f"{count[name]} not ({what})" for name, what in _INSTEAD.items() if count[name]]
    return ", ".join([f"{count['accepted']} corrected", *others])


def write_round(
    folder: str | Path, records: Sequence[Record], corrections: Sequence[Correction]
) -> None:
    """Write `corrections.jsonl`, then `data.jsonl`: where the latter is, the round is whole.

    Raises:
        DataError: the folder holds another version already, or nothing is left to learn from.
        SetupError: it cannot be written.
    """
    folder = Path(folder)
    new = [record.to_json() for record in apply_corrections(records, corrections)]
    if not new:
        raise DataError(
            "every record was left out: no correction passed its checks; set correct.policy=truth"
        )
    if (folder / "data.jsonl").exists():
        if _lines(new) != (folder / "data.jsonl").read_text(encoding="utf-8"):
            raise DataError(
                f"{folder / 'data.jsonl'} is a finished version of the data and differs from this "
                "one; versions are never changed: move it away or choose another folder"
            )
        return
    write_jsonl(folder / "corrections.jsonl", (asdict(c) for c in corrections))
    write_jsonl(folder / "data.jsonl", new)


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
