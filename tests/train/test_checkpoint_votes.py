"""A process that cannot write its part of a checkpoint stops all of them, and none hangs."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clinkd.config import DemoModelConfig, TrainConfig
from clinkd.data.records import read_records
from clinkd.errors import SetupError
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.trainer import train

pytestmark = pytest.mark.slow
SETTINGS = TrainConfig(epochs=2, learning_rate=1e-3, batch_size=1, save_steps=2, log_steps=1)
SIZE = DemoModelConfig(layers=1, width=32, vision_layers=1, vision_width=32, vocabulary=400)


def learn(rank, folder, strategy, port, told):
    """The disk of the second process is full from the second checkpoint on."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    write = torch.save

    def save(value, path, *args, **kwargs):
        if rank == 1 and "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        write(value, path, *args, **kwargs)

    torch.save = save
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:6]
    texts = [turn.value for record in records for turn in record.conversations]
    processor = build_processor(texts, SIZE.vocabulary, 3136, 3136)
    model = apply(build_model(processor, SIZE, 0), PositionConfig("paper"))
    log = MetricsLog(folder / "log.jsonl")
    job = Job("teacher", folder / "out", log, records, SAMPLE_FOLDER, 0, strategy=strategy)
    try:
        train(job, model, processor, SETTINGS)
        told.put((rank, "no error"))
    except SetupError as error:
        told.put((rank, str(error)))
    dist.barrier()  # neither left the other behind
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort the interpreter's own end


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_one_full_disk_is_told_by_all(tmp_path, strategy, free_port):
    told = mp.get_context("spawn").SimpleQueue()
    mp.spawn(learn, (tmp_path, strategy, free_port, told), nprocs=2)
    said = dict(told.get() for _ in range(2))
    assert "No space left on device" in said[1]
    assert "another process has the reason" in said[0]
    assert all("the one before it is whole" in text for text in said.values())
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("c*")) == [
        "checkpoint-2"
    ]
