"""The teacher's cache: what comes back, what is refused, what an interruption leaves."""

from dataclasses import replace

import pytest
import torch

from clinkd.data.teacher_cache import CacheSpec, TeacherCache, encode_top_k
from clinkd.errors import DataError

SOURCES = {"data": "aa", "tokenizer": "bb", "teacher": "cc"}
HIDDEN = CacheSpec("hidden", records=3, width=8, sources=SOURCES, shard_records=2)
LABELS = [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9, 10])]


def fill(folder):
    cache = TeacherCache(folder, HIDDEN)
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache.write(0, {"hidden": rows[:3]}, LABELS[:2])
    cache.write(1, {"hidden": rows[3:]}, LABELS[2:])
    return rows


def test_hidden_states_come_back_bit_for_bit(tmp_path):
    rows = fill(tmp_path)
    cache = TeacherCache(tmp_path, HIDDEN)
    assert cache.missing() == []
    found = [cache.read(i, labels)["hidden"] for i, labels in enumerate(LABELS)]
    assert torch.equal(torch.cat(found), rows)


def test_some_of_the_records_are_read_by_their_places(tmp_path):
    rows = fill(tmp_path)
    cache = TeacherCache(tmp_path, HIDDEN, places=[0, 2])
    assert torch.equal(cache.read(1, LABELS[2])["hidden"], rows[3:])
    with pytest.raises(IndexError, match="0 to 1, got 2"):
        cache.read(2, LABELS[2])


@pytest.mark.parametrize("k", [16, 64, 256])
def test_top_k_is_near_the_logits_and_small(tmp_path, k):
    temperature = 2.0
    logits = 4 * torch.randn(6, 151_936, generator=torch.Generator().manual_seed(1)) + 30
    rows = encode_top_k(logits, k, temperature)
    assert sum(t.nbytes for t in rows.values()) <= 4.5 * 6 * k
    spec = CacheSpec("top-k", 3, k, SOURCES, temperature=temperature, shard_records=3)
    TeacherCache(tmp_path, spec).write(0, rows, LABELS)
    cache = TeacherCache(tmp_path, spec)
    found = [cache.read(i, labels) for i, labels in enumerate(LABELS)]
    ids = torch.cat([each["teacher_ids"] for each in found]).long()
    values = torch.cat([each["teacher_logits"] for each in found])
    assert torch.equal(ids, logits.topk(k).indices)
    assert (ids > 0xFFFF).any()
    # half a float16 step at the distance from T * lse
    lse = torch.cat([each["teacher_lse"] for each in found])
    assert torch.equal(lse, torch.logsumexp(logits / temperature, dim=1))
    distance = (logits.gather(1, ids) - temperature * lse[:, None]).abs()
    assert ((values - logits.gather(1, ids)).abs() <= distance * 2**-11 + 1e-5).all()


@pytest.mark.parametrize("change", ["data", "tokenizer", "teacher"])
def test_other_sources_are_refused_by_name(tmp_path, change):
    fill(tmp_path)
    with pytest.raises(DataError, match=f"sources.{change} is '.*', needed 'zz'"):
        TeacherCache(tmp_path, replace(HIDDEN, sources=SOURCES | {change: "zz"}))


def test_unsealed_shard_is_written_again(tmp_path):
    fill(tmp_path)
    (tmp_path / "shard-00001.json").unlink()  # stopped between the rename and the seal
    cache = TeacherCache(tmp_path, HIDDEN)
    assert cache.missing() == [1]
    with pytest.raises(DataError, match="shard-00001"):
        cache.read(2, LABELS[2])


def test_damage_is_seen(tmp_path):
    fill(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        TeacherCache(tmp_path, HIDDEN).read(0, LABELS[0])


def test_another_answer_is_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(DataError, match="another answer"):
        TeacherCache(tmp_path, HIDDEN).read(0, torch.tensor([5, 7]))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_broken_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        TeacherCache(tmp_path, HIDDEN)


def test_rows_that_do_not_fit_are_not_written(tmp_path):
    cache = TeacherCache(tmp_path, HIDDEN)
    with pytest.raises(ValueError, match="a shard must hold"):
        cache.write(0, {"hidden": torch.zeros(3, 4)}, LABELS[:2])
    assert cache.missing() == [0, 1]
