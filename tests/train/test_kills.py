"""Training that is killed again and again ends with the weights of one that never was.

This file is also the program that it starts: one process loads a tiny model, then forks a child for
every try, so that twenty real SIGKILLs cost one start of Python.
"""

import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20
ROOT = Path(__file__).parent.parent.parent


def make_everything():
    import deepspeed  # noqa: F401 - which the Trainer imports: here once, not in every child

    from clinkd.config import DemoModelConfig, DistillConfig
    from clinkd.data.records import read_records
    from clinkd.models import apply
    from clinkd.models.demo import build_model, build_processor
    from clinkd.pipeline.paths import SAMPLE_FOLDER
    from clinkd.rotary import PositionConfig
    from clinkd.train import trainer  # noqa: F401 - as above

    size = DemoModelConfig(layers=1, width=32, vision_layers=1, vision_width=32, vocabulary=400)
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:14]
    texts = [turn.value for record in records for turn in record.conversations]
    processor = build_processor(texts, size.vocabulary, 3136, 3136)
    student, teacher = (
        apply(build_model(processor, size, seed), PositionConfig("paper")) for seed in (0, 1)
    )
    settings = DistillConfig(
        epochs=8, learning_rate=1e-2, batch_size=2, gradient_accumulation=2, save_steps=2,
        log_steps=1, warmup_ratio=0.1,
    )  # fmt: skip
    return records, SAMPLE_FOLDER, processor, student, teacher, settings


def learn(folder, everything):
    from clinkd.train.log import MetricsLog
    from clinkd.train.trainer import Job, train

    records, root, processor, student, teacher, settings = everything
    job = Job("distill", folder / "model", MetricsLog(folder / "metrics.jsonl"), records, root, 0)
    train(job, student, processor, settings, teacher)


def die_at(event, diary):
    """Die at the so-many-th event of a try, and write down which kind it was."""
    import torch

    from clinkd.train import checkpoint, trainer

    seen = {"event": 0, "batch": 0, "step": 0}

    def happens(kind):
        seen["event"] += 1
        if seen["event"] == event:
            with open(diary, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": seen["step"]}) + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def after(module, name, kind, spoil=False):
        real = getattr(module, name)

        def then(*arguments, **options):
            value = real(*arguments, **options)
            if spoil and seen["event"] + 1 == event:  # half of the file has reached the disk
                path = arguments[1]
                os.truncate(path, os.path.getsize(path) // 2)
            happens(kind)
            return value

        setattr(module, name, then)

    def compute_loss(self, *arguments, **options):
        value = real_loss(self, *arguments, **options)
        seen["batch"] += 1
        seen["step"] = self.state.global_step
        happens("mid-accumulation" if seen["batch"] % 2 else "before the step")
        return value

    real_loss = trainer.AnswerTrainer.compute_loss
    trainer.AnswerTrainer.compute_loss = compute_loss
    after(torch, "save", "save", spoil=True)
    after(checkpoint, "save_weights", "save", spoil=True)
    after(checkpoint, "_prune", "after a save")
    real_replace = os.replace

    def replace(source, target):
        happens("before a rename")
        real_replace(source, target)

    checkpoint.os.replace = replace


def fork(work):
    """Do the work in a child; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_often(folder):
    """A run never killed in `whole`, one killed `KILLS` times in `killed`."""
    everything = make_everything()
    assert fork(lambda: learn(folder / "whole", everything)) == 0
    events = random.Random(0)
    for _ in range(KILLS):
        event = events.randint(1, 16)

        def work(event=event):
            die_at(event, folder / "diary.jsonl")
            learn(folder / "killed", everything)

        status = fork(work)
        assert status == -signal.SIGKILL, status
    assert fork(lambda: learn(folder / "killed", everything)) == 0


def fill_disk(folder):
    """The files of the second checkpoint may not grow beyond a limit, like those on a full disk."""
    everything = make_everything()

    def work():
        from clinkd.train import trainer

        real = trainer.AnswerTrainer._save_checkpoint

        def save(self, *arguments):
            if self.state.global_step == 4:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limit = int(os.environ["FILE_LIMIT"])
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            real(self, *arguments)

        trainer.AnswerTrainer._save_checkpoint = save
        learn(folder / "full", everything)

    assert fork(work) == 1


def run(task, folder, **environment):
    command = [sys.executable, __file__, task, str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    done = run("kill_often", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    diary = [json.loads(line) for line in (tmp_path / "diary.jsonl").read_text().splitlines()]
    assert len(diary) == KILLS
    kinds = collections.Counter(row["kind"] for row in diary)
    assert {"mid-accumulation", "save", "before a rename", "after a save"} <= set(kinds), kinds
    assert max(row["step"] for row in diary) >= 4  # of 4 steps an epoch
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = sorted(path.name for path in (whole / "model").iterdir())
    assert names == sorted(path.name for path in (killed / "model").iterdir())
    weights = "model/model.safetensors"
    assert (whole / weights).read_bytes() == (killed / weights).read_bytes()
    assert (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 60_000, 200_000, 600_000])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path, limit):
    """Weights, optimiser states and settings are written by three libraries, with their errors."""
    done = run("fill_disk", tmp_path, FILE_LIMIT=str(limit))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SetupError: " in done.stderr
    assert "checkpoint-4: the checkpoint cannot be written (" in done.stderr
    checkpoints = tmp_path / "full" / "model" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    {"kill_often": kill_often, "fill_disk": fill_disk}[sys.argv[1]](Path(sys.argv[2]))
