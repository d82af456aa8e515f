"""A teacher cut over two processes: each holds half, and it says what the whole one says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PIXELS = 3136


def make(folder):
    from clinkd.config import DemoModelConfig
    from clinkd.data.records import read_records
    from clinkd.models import apply
    from clinkd.models.demo import build_model, build_processor
    from clinkd.pipeline.paths import SAMPLE_FOLDER
    from clinkd.rotary import PositionConfig
    from clinkd.train.checkpoint import save_model

    size = DemoModelConfig(layers=2, width=64, vision_layers=1, vision_width=32, vocabulary=500)
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:4]
    texts = [turn.value for record in records for turn in record.conversations]
    processor = build_processor(texts, size.vocabulary, PIXELS, PIXELS)
    model = apply(build_model(processor, size, 3), PositionConfig("paper"))
    save_model(folder, model, processor)


def compare(rank, folder, port):
    """One of two processes; the first one's batch has an image, the second one's has none."""
    import dataclasses

    import torch
    import torch.distributed as dist
    from transformers import AutoProcessor

    from clinkd import models
    from clinkd.data.collate import AnswerDataset, collate
    from clinkd.data.records import Turn, read_records
    from clinkd.pipeline.paths import SAMPLE_FOLDER
    from clinkd.train.sharded import cut_while_loading
    from clinkd.train.teachers import LiveTeacher

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo")
    processor = AutoProcessor.from_pretrained(
        folder, size={"shortest_edge": PIXELS, "longest_edge": PIXELS}
    )
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:4]
    if rank == 1:
        records = [
            dataclasses.replace(
                r, images=(), conversations=(Turn("human", r.question), *r.conversations[1:])
            )
            for r in records
        ]
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 512)
    whole = models.load(folder)
    for offload in (False, True):
        with cut_while_loading(torch.float32, offload):
            model = models.load(folder, dtype=torch.float32)
        total = sum(p.numel() for p in whole.parameters())
        assert sum(p.numel() for p in model.parameters()) == 0
        share = sum(p.ds_tensor.numel() for p in model.parameters())
        assert total / 2 <= share < 0.55 * total, (share, total)
        cut, expected = (LiveTeacher(m, len(processor.tokenizer)) for m in (model, whole))
        for place in range(4):
            batch = collate([dataset[place]], processor.tokenizer.pad_token_id)
            found = cut(batch)
            for name, tensor in expected(batch).items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
            held = sum(p.numel() for p in model.parameters() if p.ds_numel > 100_000)
            assert held == 0, held  # the head too is let go of
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort the interpreter's own end


@pytest.mark.slow
def test_two_processes_hold_half_each_and_agree(tmp_path, free_port):
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

    def start(*arguments):
        command = [sys.executable, "-Wignore", __file__, *map(str, arguments)]
        environment, pipe = os.environ | settings, subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    _, err = (first := start("make", tmp_path)).communicate(timeout=120)
    assert first.returncode == 0, err[-2000:]
    both = [start(rank, tmp_path, free_port) for rank in (0, 1)]
    errors = [process.communicate(timeout=300)[1][-2000:] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        compare(int(sys.argv[1]), sys.argv[2], sys.argv[3])
