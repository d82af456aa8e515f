"""What a run refuses before any work starts."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from clinkd import cli
from clinkd.config import check
from clinkd.data import images
from clinkd.errors import ConfigError, DataError, Preempted, SetupError
from clinkd.pipeline import runner, stages
from clinkd.pipeline.facts import peak_memory
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.progress import Console


def run(tmp_path, *, first="prepare", last="report", **data):
    few = {"generate": {"scorer_steps": 1}}
    config = check({"output": str(tmp_path / "run"), "data": data} | few)
    return runner.run(config, Console(io.StringIO()), first=first, last=last)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"first": "prepar"}, "unknown stage 'prepar'; expected one of prepare, teacher"),
        ({"first": "report", "last": "teacher"}, "stage 'report' comes after 'teacher'"),
    ],
)
def test_stages(tmp_path, stages, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **stages)
    assert not (tmp_path / "run").exists()


def test_missing_data(tmp_path):
    with pytest.raises(DataError, match=r"data.train: .*none.jsonl does not exist"):
        run(tmp_path, train=str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", r"first: clinkd data convert .*a\.parquet .*a\.jsonl"),
        ("a.json", "first: clinkd data convert"),
        ("a.csv", "one object a line"),
    ],
)
def test_data_in_another_format(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, train=str(tmp_path / name))
    with pytest.raises(DataError, match="is a folder, not a file of records"):
        run(tmp_path, train=str(tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_any_stage_is_no_failure(tmp_path, monkeypatch, number):
    """As in training: code 75, and the same command goes on."""
    before = signal.getsignal(number)
    real = stages.RUN["prepare"]

    def sends(folder, progress):
        os.kill(os.getpid(), number)
        return real(folder, progress)

    with monkeypatch.context() as patch:
        patch.setitem(stages.RUN, "prepare", sends)
        with pytest.raises(Preempted, match=f"stopped by {number.name}; what is done") as error:
            run(tmp_path, last="prepare")
    assert error.value.exit_code == 75
    assert signal.getsignal(number) == before
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert book["stages"]["prepare"]["status"] == "running"
    run(tmp_path, last="prepare")
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert book["stages"]["prepare"]["status"] == "done"


@pytest.mark.filterwarnings("ignore")
def test_a_signal_while_an_image_is_read_is_no_damage_of_it(tmp_path, monkeypatch):
    """Else the record would count as one that cannot be answered, and the stage go on."""

    def stopped(_):
        os.kill(os.getpid(), signal.SIGTERM)

    name = json.loads((SAMPLE_FOLDER / "test.jsonl").read_text().splitlines()[0])["image"]
    monkeypatch.setattr(images, "_upright", stopped)
    reads = lambda *_: str(images.load_image(SAMPLE_FOLDER, name))  # noqa: E731
    monkeypatch.setitem(stages.RUN, "prepare", reads)
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        run(tmp_path, last="prepare")


@pytest.mark.filterwarnings("ignore")
def test_why_a_stage_stopped_is_said_once(tmp_path, monkeypatch, capsys):
    def fails(folder, progress):
        raise DataError("what is wrong\nhow to mend it")

    config = tmp_path / "c.yaml"
    config.write_text(f"output: {tmp_path / 'run'}\n")
    monkeypatch.setitem(stages.RUN, "prepare", fails)
    monkeypatch.setattr("sys.argv", ["clinkd", "prepare", str(config)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == DataError.exit_code
    said = capsys.readouterr()
    assert said.out.split()[:2] == ["✗", "prepare"]
    assert said.out.endswith("  stopped\n")
    assert said.err == "clinkd: what is wrong\nhow to mend it\n"
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert book["stages"]["prepare"]["summary"] == "stopped: what is wrong\nhow to mend it"


def test_libraries_say_nothing_twice():
    """In a process of its own: pytest has handlers on the root logger."""
    code = """if True:
        import logging
        from clinkd.pipeline.runner import quiet_libraries
        quiet_libraries()
        quiet_libraries()
        import huggingface_hub, transformers.integrations.integration_utils
        logging.error("22 tags")  # as open_clip does it
        logging.getLogger("huggingface_hub.utils").warning("retry")
        logging.getLogger("another").warning("kept")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True, env=os.environ | {"WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.stdout == ""
    assert done.stderr == "retry\nkept\n"


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(SetupError, match="less than 200 MiB of disk space left"):
        run(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.update(image="../outside.png"), "lies outside the data root"),
        (lambda row: row.update(image="images/none.png"), "does not exist"),
        (lambda row: row.update(task="XX"), "unknown task 'XX'"),
        (lambda row: row.update(boxes=[[500, 0, 100, 100]]), "reversed"),
        (lambda row: row.update(boxes=[[0, 0, 100, 1200]]), "outside the image"),
        (lambda row: row.update(group="shared"), "shared"),
    ],
)
def test_unsound_data_stops_the_first_stage(tmp_path, spoil, message):
    """The line is named, the run folder stays usable, inputs are left as they are."""
    rows = {}
    for split in ("train", "test"):
        lines = (SAMPLE_FOLDER / f"{split}.jsonl").read_text().splitlines()[:3]
        rows[split] = [json.loads(line) for line in lines]
    outside = tmp_path.parent / "outside.png"
    shutil.copy(SAMPLE_FOLDER / rows["test"][0]["image"], outside)
    (tmp_path / "images").mkdir()
    for row in rows["train"] + rows["test"]:
        shutil.copy(SAMPLE_FOLDER / row["image"], tmp_path / row["image"])
    spoil(rows["train"][1])
    if message == "shared":
        rows["test"][0]["group"] = "shared"
    for split, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{split}.jsonl").write_text(text)
    before = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(DataError, match=message):
        run(
            tmp_path,
            train=str(tmp_path / "train.jsonl"),
            test=str(tmp_path / "test.jsonl"),
            last="prepare",
        )
    assert (tmp_path / "train.jsonl").read_bytes() == before
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert book["stages"]["prepare"]["status"] == "running"
    assert message.split()[0] in book["stages"]["prepare"]["summary"]


def test_what_made_the_numbers_is_noted(tmp_path, monkeypatch):
    for name in stages.RUN:
        monkeypatch.setitem(stages.RUN, name, lambda *_: "done")
    run(tmp_path, last="prepare")
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert book["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"accelerate", "triton", "peft", "bitsandbytes"} <= book["versions"].keys()
    assert book["machine"]["cores"] == psutil.cpu_count()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    card = type("Properties", (), {"name": "NVIDIA A100"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    run(tmp_path, first="teacher", last="teacher")
    book = json.loads((tmp_path / "run" / "run.json").read_text())
    assert book["machine"]["gpus"] == f"6 × NVIDIA A100, CUDA {torch.version.cuda}"


def test_memory_of_all_processes_counts():
    hungry = "import time; held = bytearray(200 << 20); print(1, flush=True); time.sleep(30)"
    with peak_memory() as peak:
        command = [sys.executable, "-c", hungry]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            mine, end = psutil.Process().memory_info().rss, time.monotonic() + 20
            while peak[0] < mine + (150 << 20) and time.monotonic() < end:
                time.sleep(0.05)
            child.kill()
    assert peak[0] > mine + (150 << 20)
