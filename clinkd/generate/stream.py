"""Answers of a model to records, written as they finish; a run that was killed goes on."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from clinkd.data.convention import from_model, to_model
from clinkd.data.records import Record
from clinkd.errors import DataError
from clinkd.generate.beam import BeamSearcher
from clinkd.generate.images import Loaded, with_images
from clinkd.generate.journal import Journal, join_parts
from clinkd.generate.results import Candidate, Result
from clinkd.generate.scorer import ClipScorer, mean_over_images
from clinkd.generate.select import NEEDS_SCORER, Selection, select, truth_quality
from clinkd.models import positions_of

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
    stop_texts: Sequence[str] = (),
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Answer every record's question and write `output`, one prediction a line, in their order.

    Lines go to a journal beside `output` block by block, and become `output` once all are there. A
    later call with the same model and arguments takes up the journal; one with others starts anew.
    Blocks are cut from the records in order, so that what a question is computed together with, and
    with it every digit, does not depend on interruptions. In memory are no more than one block and
    the images of the next, which are read while it is answered.

    A question that cannot be answered gets the reason as its "error" and an empty response.

    Args:
        records: the last question of each is asked, after the turns before it; the last answer is
            the annotation. Boxes are as records have them, in what is asked and in what comes back.
        batch_size: questions in flight; a block is `BLOCK` times as many.
        scorer: scores every candidate against the question's images.
        selection: see `clinkd.generate.select`; `beam` where a question has no image to score.
        mix: λ of `mixed`.
        stop_texts: see `BeamSearcher`.
        progress: called with answered, all, and a name.
        rank: of `world` processes, each of which answers neighbouring blocks and leaves them in its
            journal; `join_parts` makes the file of them, the same that one process would write.

    Raises:
        ValueError: `selection` needs a scorer and there is none, or a setting out of range.
    """
    if selection in NEEDS_SCORER and scorer is None:
        raise ValueError(f"selection {selection!r} needs a scorer")
    searcher = BeamSearcher(
        model,
        processor,
        beams,
        samples,
        max_new_tokens,
        length_penalty,
        stop_texts=stop_texts,
        batch_size=batch_size,
    )
    output = Path(output)
    settings = {
        "settings": repr((searcher.rules, samples, batch_size, selection, mix)),
        "model": _fingerprint(model),
        "positions": repr(positions_of(model.config)),  # the same weights may be put at others
        "images": processor.image_processor.to_json_string(),
        "template": processor.chat_template,
        "records": _content(records),
        "scorer": _fingerprint(scorer.backend.model) if scorer is not None else None,
    }
    size = BLOCK * batch_size
    blocks = -(-len(records) // size)
    records = records[blocks * rank // world * size : blocks * (rank + 1) // world * size]
    ids = [record.id for record in records]
    journal = Journal(output, _line(settings), ids, size, rank, world)
    starts = range(journal.done, len(records), size)
    parts = [records[start : start + size] for start in starts]
    with contextlib.closing(with_images(parts, data_root)) as blocks_ahead:
        for start, (part, images) in zip(starts, blocks_ahead, strict=True):

            def answered(count: int, start: int = start) -> None:
                if progress is not None:
                    progress(start + count, len(records), output.stem)

            answered(0)
            rows = _answer_block(searcher, part, images, scorer, selection, mix, answered)
            journal.append("".join(_line(row) for row in rows))
    if world == 1:
        join_parts(output)
    if progress is not None:
        progress(len(records), len(records), output.stem)


def _fingerprint(model: torch.nn.Module) -> str:
    """Of a model's weights: some of each tensor's values; training changes nearly all."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _content(records: Sequence[Record]) -> str:
    """Hash of all that is asked and written of the records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_line(record.to_json()).encode())
    return digest.hexdigest()


def _line(row: dict[str, Any]) -> str:
    """JSON with a newline, without the characters that some readers take for another one."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    for mark in ("\u0085", "\u2028", "\u2029"):
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text + "\n"


def _answer_block(
    searcher: BeamSearcher,
    records: Sequence[Record],
    loaded: Sequence[Loaded],
    scorer: ClipScorer | None,
    selection: Selection,
    mix: float,
    answered: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    images: dict[int, list[Image.Image]] = {}
    errors: dict[int, str] = {}
    requests = []
    for index, (record, found) in enumerate(zip(records, loaded, strict=True)):
        if isinstance(found, DataError):
            errors[index] = str(found)
            continue
        images[index] = found
        try:
            requests.append(_request(str(index), record, images[index], searcher.processor))
        except ValueError as error:
            errors[index] = str(error)
    results = {
        int(result.id): as_in_records(result, images[int(result.id)], searcher.processor)
        for result in searcher.generate(requests, answered)
    }
    for index, record in enumerate(records):
        result = results.get(index) or Result(str(index), error=errors[index])
        yield _row(record, result, images.get(index, []), scorer, selection, mix)


def _request(
    name: str, record: Record, images: list[Image.Image], processor: Any
) -> dict[str, Any]:
    """The last question of a record with all that stands before it."""
    turns = [turn.value for turn in record.conversations[:-1]]
    *history, question = (to_model(turn, processor, [i.size for i in images]) for turn in turns)
    request = {"id": name, "images": images, "question": question, "history": history}
    return request | ({"system": record.system} if record.system else {})


def as_in_records(result: Result, images: Sequence[Image.Image], processor: Any) -> Result:
    """The result with the boxes of its candidates as records have them."""
    sizes = [image.size for image in images]
    candidates = [
        replace(candidate, text=from_model(candidate.text, processor, sizes))
        for candidate in result.candidates
    ]
    return replace(result, candidates=candidates)


def _row(
    record: Record,
    result: Result,
    images: Sequence[Any],
    scorer: ClipScorer | None,
    selection: Selection,
    mix: float,
) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    if not images and selection in NEEDS_SCORER:
        selection = "beam"
    candidates, error = result.candidates, result.error
    if error is None and not candidates:
        error = "the search found no candidate"
    clip: list[float | None] = [None] * len(candidates)
    if scorer is not None and images and candidates:
        clip = list(mean_over_images(scorer, images, [c.text for c in candidates]))
    chosen = 0
    if error is None:
        try:
            chosen = select(
                candidates,
                selection,
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
        "response": candidates[chosen].text if error is None else "",
        "boxes": [list(box) for box in record.boxes],
        "selection": selection,
        "selected": chosen,
        "candidates": [
            _candidate(candidate, cosine, scorer)
            for candidate, cosine in zip(candidates, clip, strict=True)
        ],
        "error": error,
    }


def _candidate(
    candidate: Candidate, cosine: float | None, scorer: ClipScorer | None
) -> dict[str, Any]:
    row = {
        "text": candidate.text,
        "score": round(candidate.score, DIGITS),
        "mean_log_prob": round(candidate.mean_log_prob, DIGITS),
        "tokens": len(candidate.token_ids),
        "clip": None,
    }
    if scorer is not None and cosine is not None:
        row["clip"] = round(cosine, DIGITS) if math.isfinite(cosine) else None
        sentences = len(scorer.parts(candidate.text))
        if sentences > 1:
            row["clip_sentences"] = sentences  # longer than the window: "clip" is their mean
    return row
