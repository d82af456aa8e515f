"""What a teacher says about answer tokens, kept in files: its hidden states, or its top logits.

    manifest.json            what the cache was made from and how; written first
    shard-00000.safetensors  the rows of `shard_records` records, memory-mapped when read
    shard-00000.json         size and SHA-256 of that file; written last: without it no shard
    head.safetensors, .json  the teacher's output head, likewise (`hidden`)

A row belongs to one answer token, in the order of the records. `hidden` keeps the teacher's last
hidden state as it was computed: exact at any temperature. `top-k` keeps, of each row, its
log-sum-exp at one temperature and K logits with their tokens, in 4.25 + 4 / K bytes per entry:
`logit - T * lse` as float16 (small where the probability is large, so finest there), 18 bits of id.
"""

import json
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clinkd.data.files import atomic_write, sha256_file, write_json
from clinkd.errors import DataError

FORMAT = 1
MOST_VOCABULARY = 1 << 18  # ids take 18 bits
MOST_K = 256
MAX_JSON_BYTES = 1 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds and what it was made from; two that differ do not fit each other.

    Attributes:
        sources: hashes or settings by name: data, tokenizer, template, image sizes, positions,
            teacher weights, head.
        width: hidden size (`hidden`) or K, a multiple of 4 up to 256 (`top-k`).
        dtype: of hidden states; `top-k` fixes its own.
        temperature: that `lse` belongs to (`top-k`).
    """

    kind: Literal["hidden", "top-k"]
    records: int
    width: int
    sources: dict[str, str]
    dtype: str = "bfloat16"
    temperature: float = 1.0
    shard_records: int = 1024

    def __post_init__(self) -> None:
        if self.kind not in ("hidden", "top-k"):
            raise ValueError(f"kind must be 'hidden' or 'top-k', got {self.kind!r}")
        if self.kind == "top-k" and (not 4 <= self.width <= MOST_K or self.width % 4):
            raise ValueError(f"width (K) must be a multiple of 4 from 4 to 256, got {self.width}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.records < 1 or self.shard_records < 1 or self.width < 1:
            raise ValueError("records, width and shard_records must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_records)


def encode_top_k(logits: Tensor, k: int, temperature: float) -> dict[str, Tensor]:
    """Rows [N, V] of logits as the tensors of a `top-k` shard."""
    if not k <= logits.shape[1] <= MOST_VOCABULARY:
        raise ValueError(f"logits must have {k} to {MOST_VOCABULARY} columns: {logits.shape[1]}")
    logits = logits.float()
    lse = torch.logsumexp(logits / temperature, dim=1)  # [N]
    if not lse.isfinite().all():
        raise DataError("the teacher's logits hold a NaN or an infinity: is its training sound?")
    values, ids = logits.topk(k, dim=1)
    high = (ids >> 16).view(-1, k // 4, 4)
    packed = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
    return {
        "values": (values - temperature * lse[:, None]).half().cpu(),
        "ids_low": (ids & 0xFFFF).to(torch.uint16).cpu(),
        "ids_high": packed.to(torch.uint8).cpu(),
        "lse": lse.cpu(),
    }


def decode_top_k(rows: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """`teacher_logits` float32 [N, K], `teacher_ids` int32 [N, K], `teacher_lse` float32 [N]."""
    lse = rows["lse"]
    high = rows["ids_high"].int()  # [N, K / 4]
    parts = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    return {
        "teacher_logits": rows["values"].float() + temperature * lse[:, None],
        "teacher_ids": rows["ids_low"].int() | parts << 16,
        "teacher_lse": lse,
    }


class TeacherCache:
    """A cache folder, opened for one `CacheSpec`; writes missing shards, reads whole ones.

    Args:
        places: of the records that `read` counts among those of the cache; default: all.

    Raises:
        DataError: the folder was made from something else; the message says what differs.
    """

    def __init__(
        self, folder: str | Path, spec: CacheSpec, places: Sequence[int] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.spec = spec
        self.places = range(spec.records) if places is None else places
        self._open: dict[int, tuple[Any, Tensor]] = {}
        # a byte a shard: whether this process or one forked from it has checked all of it
        self._checked = mmap.mmap(-1, max(1, spec.shards))
        manifest = self.folder / "manifest.json"
        expected = {"format": FORMAT, **asdict(spec)}
        if not manifest.exists():
            write_json(manifest, expected)
        _require_same(manifest, expected, _read_json(manifest))

    def _path(self, shard: int, ending: str) -> Path:
        return self.folder / f"shard-{shard:05d}.{ending}"

    def missing(self) -> list[int]:
        """Shards that are not whole; writing goes on with them."""
        kinds = ("json", "safetensors")  # the seal, and what it seals
        return [
            shard
            for shard in range(self.spec.shards)
            if not all(self._path(shard, kind).exists() for kind in kinds)
        ]

    def whole(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing() and (self.spec.kind == "top-k" or self.has_head())

    def shard_range(self, shard: int) -> range:
        """Indices of a shard's records."""
        start = shard * self.spec.shard_records
        return range(start, min(start + self.spec.shard_records, self.spec.records))

    def write(self, shard: int, rows: dict[str, Tensor], labels: list[Tensor]) -> None:
        """Write one shard.

        Args:
            rows: `{"hidden": [N, C]}`, or what `encode_top_k` returns.
            labels: the answer tokens of each of the shard's records; N in all.
        """
        if len(labels) != len(self.shard_range(shard)):
            raise ValueError(f"labels must be of {len(self.shard_range(shard))} records")
        counts = torch.tensor([0, *(len(each) for each in labels)])
        tokens = torch.cat(labels).to(torch.int32)
        tensors = {**rows, "labels": tokens, "offsets": counts.cumsum(0)}
        self._check(tensors, shard)
        _write_sealed(self._path(shard, "safetensors"), tensors)

    def has_head(self) -> bool:
        """Whether the teacher's output head is there, whole."""
        return (self.folder / "head.json").exists()

    def write_head(self, weight: Tensor) -> None:
        """Keep the teacher's output head [V, C], which turns hidden states into logits."""
        _write_sealed(self.folder / "head.safetensors", {"weight": weight})

    def head(self) -> Tensor:
        """The output head [V, C].

        Raises:
            DataError: it is absent or damaged.
        """
        file = _open_sealed(self.folder / "head.safetensors")
        weight: Tensor = file.get_tensor("weight")
        return weight

    def read(self, record: int, labels: Tensor) -> dict[str, Tensor]:
        """Rows of one record: `hidden`, or what `decode_top_k` returns.

        Args:
            labels: its answer tokens [N], which must be those of the cache.

        Raises:
            DataError: the shard is absent or damaged, or the answer is another.
        """
        if not 0 <= record < len(self.places):
            raise IndexError(f"record must be 0 to {len(self.places) - 1}, got {record}")
        record = self.places[record]
        shard, place = divmod(record, self.spec.shard_records)
        file, offsets = self._shard(shard)
        rows = slice(int(offsets[place]), int(offsets[place + 1]))
        if not torch.equal(file.get_slice("labels")[rows], labels.to("cpu", torch.int32)):
            path = self._path(shard, "safetensors")
            raise DataError(f"{path}: record {record} has another answer here; make it again")
        if self.spec.kind == "hidden":
            return {"hidden": file.get_slice("hidden")[rows]}
        names = ("values", "ids_low", "ids_high", "lse")
        found = {name: file.get_slice(name)[rows] for name in names}
        return decode_top_k(found, self.spec.temperature)

    def verify(self) -> None:
        """Read all of it.

        Raises:
            DataError: a part is absent or damaged.
        """
        for shard in range(self.spec.shards):
            self._shard(shard)
        if self.spec.kind == "hidden":
            self.head()

    def _shard(self, shard: int) -> tuple[Any, Tensor]:
        if shard not in self._open:
            path = self._path(shard, "safetensors")
            file = _open_sealed(path, known=self._checked[shard] == 1)
            if self._checked[shard] != 1:
                try:
                    self._check({name: file.get_tensor(name) for name in file.keys()}, shard)  # noqa: SIM118
                except ValueError as error:
                    raise DataError(f"{path}: cannot be used: {error}") from None
                self._checked[shard] = 1
            self._open[shard] = (file, file.get_tensor("offsets"))
        return self._open[shard]

    def _check(self, tensors: dict[str, Tensor], shard: int) -> None:
        """Names, types and shapes of a shard's tensors."""
        rows, width = tensors["labels"].shape[0] if "labels" in tensors else 0, self.spec.width
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "labels": ((rows,), torch.int32),
            "offsets": ((len(self.shard_range(shard)) + 1,), torch.int64),
        }
        if self.spec.kind == "hidden":
            expected["hidden"] = ((rows, width), DTYPES[self.spec.dtype])
        else:
            expected |= {
                "values": ((rows, width), torch.float16),
                "ids_low": ((rows, width), torch.uint16),
                "ids_high": ((rows, width // 4), torch.uint8),
                "lse": ((rows,), torch.float32),
            }
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if found != expected:
            raise ValueError(f"a shard must hold {expected}, got {found}")
        offsets = tensors["offsets"]
        ends = (int(offsets[0]), int(offsets[-1]))
        if ends != (0, rows) or bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must rise from 0 to the number of rows")


def _write_sealed(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_write(path, "wb") as file:
        file.write(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    seal = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(path.with_suffix(".json"), seal)


def _open_sealed(path: Path, *, known: bool = False) -> Any:
    """The file, read whole to see that it is what was written, unless that is `known`."""
    seal = _read_json(path.with_suffix(".json"))
    try:
        if not known and seal != {"bytes": path.stat().st_size, "sha256": sha256_file(path)}:
            raise DataError(f"{path}: its checksum is wrong; delete it and its .json")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be used: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path}: over {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _require_same(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    def flat(tree: dict[str, Any]) -> dict[str, Any]:
        sources = tree.get("sources")
        named = sources if isinstance(sources, dict) else {}
        return {k: v for k, v in tree.items() if k != "sources"} | {
            f"sources.{name}": value for name, value in named.items()
        }

    ours, theirs = flat(expected), flat(found)
    differing = [
        f"{name} is {theirs.get(name)!r}, needed {ours.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise DataError(
            f"{path}: the cache does not fit: {'; '.join(differing)}; delete the folder"
        )
