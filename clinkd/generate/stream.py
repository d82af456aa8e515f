"""Answers of a model to records, written as they finish; a run that was killed goes on."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from clinkd.data.files import write_jsonl
from clinkd.data.images import load_image
from clinkd.data.records import Record
from clinkd.errors import DataError
from clinkd.generate.beam import BeamSearcher
from clinkd.generate.results import Candidate, Result
from clinkd.generate.scorer import ClipScorer
from clinkd.generate.select import Selection, select, truth_quality

Progress = Callable[[int, int, str], None]
BLOCK = 4  # batches of questions searched together and written together
DIGITS = 6  # of scores: the file is the same on every run


def answer_records(
    model: PreTrainedModel,
    processor: Any,
    records: Sequence[Record],
    data_root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    beams: int = 3,
    samples: int = 3,
    max_new_tokens: int = 80,
    length_penalty: float = 1.0,
    batch_size: int = 8,
    scorer: ClipScorer | None = None,
    selection: Selection = "beam",
    mix: float = 0.5,
    progress: Progress | None = None,
) -> None:
    """Answer every record's question and write `output`, one prediction a line, in their order.

    Lines go to a journal beside `output` block by block, and become `output` once all are there. A
    later call with the same arguments takes up the journal. Blocks are cut from the records in
    order, so that what a question is computed together with, and with it every digit, does not
    depend on interruptions.

    Raises:
        ValueError: `selection` needs a scorer and there is none.
    """
    if selection in ("clip", "mixed") and scorer is None:
        raise ValueError(f"selection {selection!r} needs a scorer")
    searcher = BeamSearcher(
        model,
        processor,
        beams,
        samples,
        max_new_tokens,
        length_penalty,
        batch_size=batch_size,
    )
    output = Path(output)
    journal = output.with_name(f".{output.name}.journal")
    journal.parent.mkdir(parents=True, exist_ok=True)
    block = BLOCK * batch_size
    done = _recover(journal, records, block)
    with open(journal, "a", encoding="utf-8") as file:
        for start in range(done, len(records), block):
            if progress is not None:
                progress(start, len(records), output.stem)
            part = records[start : start + block]
            for row in _answer_block(searcher, part, data_root, scorer, selection, mix):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    if progress is not None:
        progress(len(records), len(records), output.stem)
    os.replace(journal, output)


def _recover(journal: Path, records: Sequence[Record], block: int) -> int:
    """Keep the whole blocks of a journal; the number of records that they answer."""
    rows = []
    if journal.exists():
        for line, record in zip(
            journal.read_text(encoding="utf-8").splitlines(), records, strict=False
        ):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # cut in half when the process was killed
            if row.get("id") != record.id:
                break  # of other records
            rows.append(row)
        whole = len(rows) if len(rows) == len(records) else len(rows) // block * block
        rows = rows[:whole]
        write_jsonl(journal, rows)
    return len(rows)


def _answer_block(
    searcher: BeamSearcher,
    records: Sequence[Record],
    data_root: str | os.PathLike[str],
    scorer: ClipScorer | None,
    selection: Selection,
    mix: float,
) -> Iterator[dict[str, Any]]:
    images: dict[int, list[Any]] = {}
    errors: dict[int, str] = {}
    requests = []
    for index, record in enumerate(records):
        try:
            images[index] = [load_image(data_root, name) for name in record.images]
        except DataError as error:
            errors[index] = str(error)
            continue
        requests.append({"id": str(index), "images": images[index], "question": record.question})
    results = {int(result.id): result for result in searcher.generate(requests)}
    for index, record in enumerate(records):
        result = results.get(index) or Result(str(index), error=errors[index])
        yield _row(record, result, images.get(index, []), scorer, selection, mix)


def _row(
    record: Record,
    result: Result,
    images: Sequence[Any],
    scorer: ClipScorer | None,
    selection: Selection,
    mix: float,
) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    candidates, error = result.candidates, result.error
    if error is None and not candidates:
        error = "the search found no candidate"
    clip: list[float | None] = [None] * len(candidates)
    if scorer is not None and images and candidates:
        # several images: a text is as good as its mean over them
        scores = [scorer.score(image, [c.text for c in candidates]) for image in images]
        clip = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    chosen = 0
    if error is None:
        try:
            chosen = select(
                candidates,
                "beam" if selection in ("clip", "mixed") and not images else selection,
                clip=clip,
                mix=mix,
                task=record.task,
                quality=truth_quality(record.task, record.answer),
            )
        except ValueError as problem:
            error = str(problem)
    return {
        "id": record.id,
        "image": record.images[0] if len(record.images) == 1 else list(record.images),
        "modality": record.modality,
        "task": record.task,
        "group": record.group,
        "question": record.question,
        "annotation": record.answer,
        "response": candidates[chosen].text if candidates else "",
        "boxes": [list(box) for box in record.boxes],
        "selection": selection,
        "selected": chosen,
        "candidates": [
            _candidate(candidate, cosine)
            for candidate, cosine in zip(candidates, clip, strict=True)
        ],
        "error": error,
    }


def _candidate(candidate: Candidate, cosine: float | None) -> dict[str, Any]:
    finite = cosine is not None and cosine == cosine
    return {
        "text": candidate.text,
        "score": round(candidate.score, DIGITS),
        "mean_log_prob": round(candidate.mean_log_prob, DIGITS),
        "tokens": len(candidate.token_ids),
        "clip": round(cosine, DIGITS) if finite and cosine is not None else None,
    }
