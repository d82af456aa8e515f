"""What each stage does: it reads the run folder and writes its own files only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from clinkd import models, report
from clinkd.config import DEMO, CorrectConfig, RunConfig
from clinkd.data.checks import require_sound
from clinkd.data.collate import AnswerDataset
from clinkd.data.files import copy_file, read_jsonl, sha256_file, write_jsonl
from clinkd.data.lengths import require_fit
from clinkd.data.records import Record, read_records, write_records
from clinkd.data.select import limit_records, teacher_subset
from clinkd.data.tokenizer import require_same_tokens
from clinkd.evaluate.run import evaluate_run
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root, records_file
from clinkd.pipeline.preflight import require_parts, require_places
from clinkd.pipeline.scorer import ready_scorer
from clinkd.pipeline.steps import (
    asked_records,
    fit_check,
    load_processor,
    positions_of,
    read_config,
    require_same_images,
    start_of,
    uses_cache,
)
from clinkd.pipeline.tasks import AnswerTask, CacheTask, TrainTask, run_task
from clinkd.progress import Update
from clinkd.train.correction.correct import correct_records, write_round
from clinkd.train.correction.similarity import make_similarity
from clinkd.train.correction.versions import count_statuses
from clinkd.train.correctors import make_corrector

Stage = Callable[[RunFolder, Update], str]


def prepare(folder: RunFolder, progress: Update) -> str:
    """Check the data, draw the teacher's share, build the embedded model and scorer."""
    config = folder.config
    root = data_root(config.data)
    train_records = read_records(records_file(config.data.train, "train"))
    test_records = read_records(records_file(config.data.test, "test"))
    require_parts(config, test_records)
    train_records = limit_records(train_records, config.data.train_limit, config.seed)
    test_records = limit_records(test_records, config.data.test_limit, config.seed)
    require_sound(train_records, test_records, root)
    teacher_records = teacher_subset(train_records, config.data.teacher_fraction, config.seed)
    write_records(folder.data("teacher"), teacher_records)
    _write_split(folder, "train", config.data.train, config.data.train_limit, train_records)
    if config.model.student == DEMO:
        _build_demo_model(folder, train_records)
    student, teacher = start_of(folder), config.model.teacher
    if teacher not in (None, DEMO, student):
        require_same_images(read_config(student), read_config(teacher), student, teacher)
        _require_same_tokens(config, teacher, student)
    _require_fit(folder, teacher_records, train_records, test_records)
    ready_scorer(folder, lambda: train_records, progress)
    folder.note("prepare", test=_test_split(config))  # looked at: `generate` need not
    return (
        f"{len(train_records)} training and {len(test_records)} test records, "
        f"{len(teacher_records)} for the teacher"
    )


def _test_split(config: RunConfig) -> list[Any]:
    """What tells a test split from another."""
    return [sha256_file(records_file(config.data.test, "test")), config.data.test_limit]


def _write_split(
    folder: RunFolder, split: str, name: str, limit: int | None, records: Sequence[Record]
) -> None:
    if limit is None:  # ten times as fast as writing them anew
        copy_file(records_file(name, split), folder.data(split))
    else:
        write_records(folder.data(split), records)


def _require_fit(
    folder: RunFolder,
    teacher_records: Sequence[Record],
    train_records: Sequence[Record],
    test_records: Sequence[Record],
) -> None:
    """Make sure now, not when the teacher is trained, that no stage meets too long a record."""
    config = folder.config
    processor, root = load_processor(config, start_of(folder)), data_root(config.data)
    longest = config.distill.max_length
    if config.correct.rounds:
        longest = min(longest, config.correct.max_length)
    require_fit(AnswerDataset(teacher_records, root, processor, config.teacher.max_length))
    train, test = (
        AnswerDataset(records, root, processor, longest)
        for records in (train_records, test_records)
    )
    require_fit(train)
    for dataset in (train, test):
        require_places(dataset, positions_of(config))


def _require_same_tokens(config: RunConfig, teacher: str, student: str) -> None:
    ours, theirs = (load_processor(config, name).tokenizer for name in (student, teacher))
    require_same_tokens(ours, theirs, student, teacher)


def _build_demo_model(folder: RunFolder, records: Sequence[Record]) -> None:
    from clinkd.models.demo import build_model, build_processor
    from clinkd.train.checkpoint import save_model

    config = folder.config.model
    texts = [turn.value for record in records for turn in record.conversations]
    processor = build_processor(texts, config.demo.vocabulary, config.min_pixels, config.max_pixels)
    model = build_model(processor, config.demo, folder.config.seed)
    models.apply(model, positions=positions_of(folder.config))
    save_model(folder.student("base"), model, processor)


def teacher(folder: RunFolder, progress: Update) -> str:
    """Fine-tune a copy of the start on the teacher's share of the training split."""
    given = folder.config.model.teacher
    start = start_of(folder) if given in (None, DEMO) else given
    return run_task(folder, TrainTask("teacher", start, str(folder.teacher)), progress)


def pseudo_label(folder: RunFolder, progress: Update) -> str:
    """Let the teacher answer the training split, with its confidence in each answer.

    Soft labels are its distributions over the true answers, so nobody would read what it writes.
    """
    if folder.config.distill.pseudo_labels == "soft":
        return "left out (distill.pseudo_labels = soft: the teacher is asked while distilling)"
    answers = folder.path / "pseudo" / "answers.jsonl"
    run_task(folder, AnswerTask(str(folder.teacher), "train", str(answers)), progress)
    rows = list(read_jsonl(answers))
    for row in rows:
        row["confidence"] = _confidence(row)
    write_jsonl(folder.path / "pseudo" / "labels.jsonl", rows)
    mean = sum(row["confidence"] for row in rows) / max(1, len(rows))
    return f"{len(rows)} answers, mean token probability {mean:.2f}"


def _confidence(row: dict[str, Any]) -> float:
    """Geometric mean of the answer's token probabilities; 0 where there is no answer."""
    if row["error"] is not None:
        return 0.0
    return round(float(torch.tensor(row["candidates"][0]["mean_log_prob"]).exp()), 6)


def distill(folder: RunFolder, progress: Update) -> str:
    """Train the student on the truth and on the teacher's distributions or answers."""
    output = str(folder.student("distilled"))
    if uses_cache(folder.config):
        run_task(folder, CacheTask(), progress)
    return run_task(folder, TrainTask("distill", start_of(folder), output), progress)


def correct(folder: RunFolder, progress: Update) -> str:
    """Answer the training split, correct weak answers against the truth, learn from them."""
    config = folder.config.correct
    if config.rounds == 0:
        return "left out (correct.rounds = 0)"
    similarity = make_similarity(config.similarity)
    corrector = make_corrector(
        config.corrector,
        cache=folder.path / "replies.jsonl",  # no stage's own: a new try pays nothing twice
        data_root=data_root(folder.config.data),
    )
    current = str(folder.student("distilled"))
    for round_ in range(1, config.rounds + 1):
        output = folder.student(f"round-{round_}")
        if not (output / "config.json").exists():
            _round(folder, round_, current, corrector, similarity, progress)
        current = str(output)
    done = [f"round {k}: {_outcome(folder, k)}" for k in range(1, config.rounds + 1)]
    return ", ".join([*done, *filter(None, [corrector.summary()])])


def _round(
    folder: RunFolder,
    round_: int,
    start: str,
    corrector: Any,
    similarity: Any,
    progress: Update,
) -> None:
    config: CorrectConfig = folder.config.correct
    place = folder.correction(round_)
    stage = f"correct-{round_}"
    if not (place / "data.jsonl").exists():
        answers = place / "answers.jsonl"
        run_task(folder, AnswerTask(start, stage, str(answers)), progress)
        corrections = correct_records(
            _asked(folder, round_),
            {row["id"]: row["response"] for row in read_jsonl(answers)},
            corrector=corrector,
            similarity=similarity,
            threshold=config.threshold,
            iou_threshold=config.iou_threshold,
            policy=config.policy,
            why_unfit=fit_check(folder, start, config.max_length).why_not,
            progress=progress,
        )
        write_round(place, asked_records(folder, "train"), corrections)
    output = str(folder.student(f"round-{round_}"))
    run_task(folder, TrainTask(stage, start, output), progress)


def _asked(folder: RunFolder, round_: int) -> list[Record]:
    """The records that a round asks about; with the policy `keep` as the round before left them."""
    records = asked_records(folder, f"correct-{round_}")
    if round_ == 1 or folder.config.correct.policy != "keep":
        return records
    earlier = {r.id: r for r in read_records(folder.correction(round_ - 1) / "data.jsonl")}
    return [earlier[record.id] for record in records]


def _outcome(folder: RunFolder, round_: int) -> str:
    """What became of a round's weak answers, in a few words."""
    rows = read_jsonl(folder.correction(round_) / "corrections.jsonl")
    return count_statuses([row["status"] for row in rows])


def generate_answers(folder: RunFolder, progress: Update) -> str:
    """Answer the test split with every model; CLIP chooses among the last one's beams."""
    config, data = folder.config.generate, folder.config.data
    if not folder.data("test").exists():
        records = read_records(records_file(data.test, "test"))
        records = limit_records(records, data.test_limit, folder.config.seed)
        if folder.book()["stages"].get("prepare", {}).get("test") != _test_split(folder.config):
            require_sound(read_records(folder.data("train")), records, data_root(data))
            processor = load_processor(folder.config, start_of(folder))
            dataset = AnswerDataset(records, data_root(data), processor, max_length=1)
            require_places(dataset, positions_of(folder.config))
        _write_split(folder, "test", data.test, data.test_limit, records)
    ready_scorer(folder, lambda: read_records(folder.data("train")), progress)
    earlier = {
        "base": start_of(folder),
        "teacher": str(folder.teacher),
        "distilled": str(folder.student("distilled")),
    }
    for name, path in earlier.items():
        output = folder.path / "predictions" / f"{name}.jsonl"
        if not output.exists():
            task = AnswerTask(path, "test", str(output), config.num_beams)
            run_task(folder, task, progress)
    output = folder.path / "predictions.jsonl"
    last = AnswerTask(str(folder.final_student), "test", str(output), config.num_beams, final=True)
    run_task(folder, last, progress)
    failed = [row["error"] is not None for row in read_jsonl(output)]
    answers = f"{len(failed)} answers" + (f" ({sum(failed)} failed)" if any(failed) else "")
    return f"{answers}, beams {config.num_beams}, selection {config.selection!r}"


def evaluate_answers(folder: RunFolder, progress: Update) -> str:
    """Score every model and the trivial baselines by the chosen protocol."""
    settings = folder.config.evaluate
    metrics = evaluate_run(
        folder.path,
        protocol_name=settings.protocol,
        test_records=read_records(folder.data("test")),
        train_records=read_records(folder.data("train")),
        meteor=settings.meteor,
        spice=settings.spice,
        bootstrap=settings.bootstrap,
        seed=folder.config.seed,
        rounds=folder.config.correct.rounds,
        selection=folder.config.generate.selection,
    )
    scores = {name: model["average"] for name, model in metrics["models"].items()}
    return ", ".join(f"{name} {score:.1f}" for name, score in scores.items())


def write_report(folder: RunFolder, progress: Update) -> str:
    """Make the page that shows all of it."""
    path = report.build_report(folder.path, data_root(folder.config.data))
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"


RUN: dict[str, Stage] = {
    "prepare": prepare,
    "teacher": teacher,
    "pseudo-label": pseudo_label,
    "distill": distill,
    "correct": correct,
    "generate": generate_answers,
    "evaluate": evaluate_answers,
    "report": write_report,
}
