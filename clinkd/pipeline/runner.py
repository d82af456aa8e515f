"""Run stages in order, skip what is done, keep time and memory."""

import io
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime

from clinkd.config import RunConfig
from clinkd.errors import ConfigError, Preempted, SetupError
from clinkd.pipeline.facts import note_gpus, note_versions, peak_memory
from clinkd.pipeline.folder import CHEAP, STAGES, RunFolder, fingerprints, free_bytes
from clinkd.pipeline.inputs import read_inputs
from clinkd.pipeline.paths import records_file, with_whole_paths
from clinkd.progress import Console

INTERRUPTED = "stopped by Ctrl-C; what is done stays done: start again to go on"
LEAST_FREE_BYTES = 200 << 20  # under this a run does not start: a stage would break in its middle


def run(
    config: RunConfig,
    console: Console,
    *,
    first: str = STAGES[0],
    last: str = STAGES[-1],
    update: bool = False,
) -> RunFolder:
    """Do the stages from `first` to `last` that are not done yet.

    Raises:
        ConfigError: an unknown stage, `first` after `last`, or, without `update`, a stage that was
            done with other settings or from other data.
        Preempted: SIGTERM or SIGUSR1 came; what is done stays done.
        ClinkdError: what a stage says; what is done stays done.
    """
    for name in (first, last):
        if name not in STAGES:
            raise ConfigError(f"unknown stage {name!r}; expected one of {', '.join(STAGES)}")
    wanted = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if not wanted:
        raise ConfigError(f"stage {first!r} comes after {last!r}")
    with stopped_by_signals():
        return _run_stages(with_whole_paths(config), console, wanted, update)


def _run_stages(
    config: RunConfig, console: Console, wanted: Sequence[str], update: bool
) -> RunFolder:
    for split in ("train", "test"):
        records_file(getattr(config.data, split), split)  # before there is a folder
    with RunFolder.open(config, update=update) as folder:
        if free_bytes(folder.path) < LEAST_FREE_BYTES:
            raise SetupError(
                f"{folder.path}: less than {LEAST_FREE_BYTES >> 20} MiB of disk space left"
            )
        with console.stage("images") as progress:
            inputs = read_inputs(config, folder.path, progress)
        if inputs.changed:
            more = f" and {len(inputs.changed) - 1} more" if inputs.changed[1:] else ""
            console.print(f"changed since the last start: image {inputs.changed[0]}{more}")
        marks = fingerprints(config, inputs.hashes)
        for stage in STAGES[: STAGES.index(wanted[0])]:
            folder.require(stage, marks[stage])
        if not update:
            for stage in wanted:
                _require_unchanged(folder, stage, marks[stage])
        folder.write_config()
        inputs.save(folder.path)
        note_versions(folder)
        for stage in wanted:
            _run_stage(folder, stage, marks[stage], console)
    return folder


def _require_unchanged(folder: RunFolder, stage: str, fingerprint: str) -> None:
    """Make sure that nothing dear would be done again, before anything is written.

    Raises:
        ConfigError: it would.
    """
    entry = folder.book()["stages"].get(stage, {})
    done, same = entry.get("status") == "done", entry.get("fingerprint") == fingerprint
    if done and not same and stage not in CHEAP:
        raise ConfigError(
            f"stage {stage!r} in {folder.path} was done with other settings or from other "
            "data; choose another folder with output=FOLDER, or give --update to do it, and "
            "what follows, again"
        )


def _run_stage(folder: RunFolder, stage: str, fingerprint: str, console: Console) -> None:
    quiet_libraries()
    from clinkd.pipeline import stages  # here: it imports torch and transformers

    entry = folder.book()["stages"].get(stage, {})
    if entry.get("fingerprint") == fingerprint and entry.get("status") == "done":
        console.stage_skipped(stage, entry.get("summary", ""))
        return
    if entry.get("fingerprint") != fingerprint:
        folder.forget_from(stage)
        folder.clear(stage)
        entry = {}
    folder.note(
        stage,
        status="running",
        fingerprint=fingerprint,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    before = float(entry.get("seconds", 0.0))  # of the tries that were cut off
    start = time.monotonic()
    status = "running"
    if stage not in CHEAP:  # another machine may score what this one has trained
        note_gpus(folder)
    with peak_memory() as peak, console.stage(stage) as progress:
        try:
            summary = stages.RUN[stage](folder, progress)
            status = "done"
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            why = str(error) or type(error).__name__
            summary = INTERRUPTED if interrupted else f"stopped: {why}"
            # what is raised says why, in whoever's last line it becomes
            said = INTERRUPTED if interrupted else "stopped"
            console.stage_failed(stage, said, time.monotonic() - start)
            raise
        finally:
            folder.note(
                stage,
                status=status,
                seconds=round(before + time.monotonic() - start, 1),
                peak_mib=max(peak[0] >> 20, entry.get("peak_mib", 0)),
                summary=summary,
            )
    console.stage_done(stage, summary, time.monotonic() - start)


class _Stop(BaseException):
    """A signal's. No `Exception`: readers of images would take it for damage of a file."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end what runs inside.

    Training has handlers of its own, and saves first.
    """

    def stop(number: int, _: object) -> None:
        name = signal.Signals(number).name
        raise _Stop(f"stopped by {name}; what is done stays done: start again to go on")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except _Stop as error:
        raise Preempted(str(error)) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quiet_libraries() -> None:
    """Our own bars and lines say what happens; libraries' bars would run through them."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _log_once()
    if os.environ.get("WANDB_MODE") == "offline":
        with redirect_stdout(io.StringIO()):  # prints the mode, whether or not a run logs there
            import transformers.integrations.integration_utils  # noqa: F401
    # of what they will rename, which users cannot change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it chose so


def _log_once() -> None:
    """Warnings of libraries come once, and without what open_clip tells the root logger.

    Its `logging.error` would call `basicConfig`, which prints again what others have printed.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.lastResort or logging.NullHandler())
    root.addFilter(_is_named)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


def _is_named(record: logging.LogRecord) -> bool:
    return record.name != "root"
