"""A run is a folder: where every stage reads, and writes its own files only."""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import yaml

from clinkd._version import __version__
from clinkd.config import SAMPLE, RunConfig, check, dump
from clinkd.data.files import write_json, write_text
from clinkd.errors import ClinkdError, ConfigError, DataError, SetupError

STAGES = (
    "prepare",
    "teacher",
    "pseudo-label",
    "distill",
    "correct",
    "generate",
    "evaluate",
    "report",
)

CHEAP = ("evaluate", "report")  # done again unasked

# what each stage alone writes, removed before it starts over
OWNED = {
    "prepare": ("data/train.jsonl", "data/teacher.jsonl", "student/base", "scorer"),
    "teacher": ("teacher",),
    "pseudo-label": ("pseudo", "teacher-cache"),
    "distill": ("student/distilled",),
    "correct": ("correction", "student/round-*"),
    # with the journals that a killed process left, or a changed split would be mixed into them
    "generate": (
        "predictions.jsonl",
        ".predictions.jsonl.journal*",
        "predictions",
        "data/test.jsonl",
    ),
    "evaluate": ("metrics.json",),
    "report": ("report.html",),
}

# keys of `correct.corrector` that say how calls go, not what comes of them
CALLING = (
    "key_env",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "max_failures",
    "dry_run",
)
_ANY_INPUTS = {"train": "", "test": ""}  # hashes of files, where configs alone are compared


_locks: "WeakSet[IO[str]]" = WeakSet()


def _let_go_of_locks() -> None:
    """In a child: it may outlive a process that is killed, and would keep the folder for itself."""
    for lock in _locks:
        lock.close()


os.register_at_fork(after_in_child=_let_go_of_locks)


class RunFolder:
    """Paths, the stage book (run.json) and the lock of one run."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, config: RunConfig, *, update: bool = False) -> "RunFolder":
        """Create the folder or go on in it, alone.

        Args:
            update: accept a config that differs in what a stage was done with; it is the folder's
                own after `write_config`, and the stages it concerns are done again.

        Raises:
            ConfigError: something was done in the folder with another configuration.
            SetupError: it cannot be written, or another process works in it.
        """
        folder = cls(Path(config.output), config)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._take_lock()
            folder._check_config(update)
            if not (folder.path / "config.yaml").exists():
                folder.write_config()
        except (ConfigError, DataError):
            folder.close()
            raise
        except (OSError, SetupError) as error:
            folder.close()
            reason = error.strerror if isinstance(error, OSError) else error
            raise SetupError(
                f"run folder {folder.path} cannot be used: {reason}; choose another with "
                "output=FOLDER"
            ) from None
        return folder

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_config(self) -> None:
        """Make the configuration the folder's own."""
        write_text(self.path / "config.yaml", dump(self.config))

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        _locks.add(self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise SetupError(f"another process is working in run folder {self.path}") from None

    def _check_config(self, update: bool) -> None:
        existing = self.path / "config.yaml"
        if not existing.exists():
            if any(p.name != ".lock" and p.suffix != ".tmp" for p in self.path.iterdir()):
                raise ConfigError(
                    f"{self.path} is not empty and holds no run; choose another with output=FOLDER"
                )
            return
        theirs = yaml.safe_load(existing.read_text(encoding="utf-8"))
        ours = self.config.model_dump(mode="json")
        different = sorted(_differences(theirs, ours, ""))
        different = [key for key in different if key != "output"]
        if different and not update and self._is_concerned(theirs):
            raise ConfigError(
                f"run folder {self.path} belongs to another configuration; different: "
                f"{', '.join(different)}. Choose another folder with output=FOLDER, or give "
                "--update to do the stages that this concerns again"
            )

    def _is_concerned(self, theirs: Any) -> bool:
        """Whether something was done that another config than the folder's would do again."""
        stages = self.book()["stages"].items()
        done = {name for name, entry in stages if entry.get("status") == "done"}
        begun = {name for name, _ in stages} - {"prepare"}  # of that one nothing is half done
        with suppress(ConfigError):  # one of another version, say
            marks = [fingerprints(each, _ANY_INPUTS) for each in (check(theirs), self.config)]
            return any(marks[0][s] != marks[1][s] for s in (done | begun) - {*CHEAP})
        return bool(done | begun)

    # paths ---------------------------------------------------------------------------------

    def data(self, split: str) -> Path:
        """JSON lines of `train`, `test` or `teacher`."""
        return self.path / "data" / f"{split}.jsonl"

    def student(self, name: str) -> Path:
        """Model folder `base`, `distilled` or `round-k`."""
        return self.path / "student" / name

    @property
    def final_student(self) -> Path:
        """The last model of the run."""
        rounds = self.config.correct.rounds
        return self.student(f"round-{rounds}" if rounds else "distilled")

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    @property
    def scorer(self) -> Path:
        return self.path / "scorer"

    def correction(self, round_: int) -> Path:
        return self.path / "correction" / f"round-{round_}"

    # the stage book -------------------------------------------------------------------------

    def book(self) -> dict[str, Any]:
        """run.json, or an empty book."""
        path = self.path / "run.json"
        if not path.exists():
            return {"clinkd": __version__, "seed": self.config.seed, "stages": {}}
        try:
            book: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is damaged: {error.msg}; remove it to start over") from None
        return book

    def write_book(self, book: dict[str, Any]) -> None:
        write_json(self.path / "run.json", book)

    def note(self, stage: str, **facts: Any) -> None:
        """Write facts about a stage into run.json."""
        book = self.book()
        book["stages"].setdefault(stage, {}).update(facts)
        self.write_book(book)

    def clear(self, stage: str) -> None:
        """Remove what a stage wrote earlier."""
        for pattern in OWNED[stage]:
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def forget_from(self, stage: str) -> None:
        """Take a stage and those after it for not done: it is going to be done anew."""
        book = self.book()
        for later in STAGES[STAGES.index(stage) :]:
            book["stages"].pop(later, None)
        self.write_book(book)

    def require_done(self, stage: str) -> dict[str, Any]:
        """Make sure that a stage is done, from whatever; what is noted of it.

        Raises:
            ClinkdError: it is not; which command does it.
        """
        entry: dict[str, Any] = self.book()["stages"].get(stage, {})
        if entry.get("status") != "done":
            raise ClinkdError(
                f"stage {stage!r} is not done in {self.path}; run it first: clinkd {stage} CONFIG"
            )
        return entry

    def require(self, stage: str, fingerprint: str) -> None:
        """Make sure that a stage is done, and from what the configuration and data say now.

        Raises:
            ClinkdError: it is not; which command does it.
        """
        if self.require_done(stage).get("fingerprint") != fingerprint:
            raise ClinkdError(
                f"stage {stage!r} in {self.path} was done with other settings or from other data; "
                f"do it again: clinkd run CONFIG --from {stage} --update"
            )


def _differences(a: Any, b: Any, key: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for name in {*a, *b}
            for found in _differences(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if a == b else [key]


def fingerprints(config: RunConfig, inputs: dict[str, str]) -> dict[str, str]:
    """What each stage's result depends on, as one hash; each includes the stage before it.

    Args:
        inputs: hashes of what the run reads, by split.
    """
    whole = config.model_dump(mode="json")
    data = whole["data"]
    for split in ("train", "test"):
        if data[split] != SAMPLE:
            data[split] = ""  # `inputs` tells it from others, wherever it lies
    data["root"] = None
    # of the test split nothing is learnt: another one is answered by the models that there are
    tested = {name: data.pop(name) for name in ("test", "test_limit")}
    # teacher and student answer with them too, for labels and for correction
    answers = {k: whole["generate"][k] for k in ("max_new_tokens", "length_penalty", "batch_size")}
    for name in CALLING:  # or a smaller pace would cost the rounds that are done
        del whole["correct"]["corrector"][name]
    labels = whole["distill"]["pseudo_labels"]
    parts: dict[str, Any] = {
        "prepare": [inputs["train"], whole["seed"], data, whole["model"]],
        "teacher": whole["teacher"],
        "pseudo-label": [labels, *([] if labels == "soft" else [answers])],
        "distill": whole["distill"],
        "correct": [whole["correct"], *([answers] if labels == "soft" else [])],
        "generate": [inputs["test"], tested, whole["generate"]],
        # cheap: done again by every version
        "evaluate": [whole["evaluate"], __version__],
        "report": [],
    }
    out: dict[str, str] = {}
    before = ""
    for stage in STAGES:
        text = json.dumps([before, parts[stage]], sort_keys=True)
        before = out[stage] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return out


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write there."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize
