"""Runs CUDA kernels on the CPU: compiled as plain C++, a fiber for each CUDA thread.

    machine = SimtMachine(CSRC, ("rotary.cu",), cache)
    machine.run("rotary_cuda", {"x": x, "out": out, "batch": 2, ...}, Schedule("reverse"))

Every `int NAME(const ARGS& args, void* stream)` of the sources can be called, with a value for
every field of ARGS: a tensor (or None) for a pointer, a list for an array, a dict for a struct.
"""

import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simt_build import Change, build, sanitizer_library
from simt_worker import launch, load

CSRC = Path(__file__).parent.parent.parent / "csrc"
ORDERS = ("forward", "reverse", "shuffled", "warps up", "warps down")


@dataclass(frozen=True)
class Schedule:
    """Who goes on when a thread waits; `dropped`: "file:line" of a barrier that is left out."""

    order: str = "forward"
    seed: int = 0
    dropped: str = ""

    @property
    def numbers(self) -> tuple[int, int, bytes]:
        """As the library takes it."""
        dropped = f"/{self.dropped}" if self.dropped else ""
        return ORDERS.index(self.order), self.seed, dropped.encode()


SCHEDULES = [*(Schedule(order) for order in ORDERS), Schedule("shuffled", 1)]


class Fault(RuntimeError):
    """What a launch did that it must not."""


class SimtMachine:
    """Kernels of some sources; the arguments are those of `simt_build.build`."""

    def __init__(
        self,
        sources: tuple[str, ...],
        cache: Path,
        changes: tuple[Change, ...] = (),
        sanitize: bool = False,
        races: bool = False,
        folder: Path = CSRC,
        flags: tuple[str, ...] = ("-O1",),
    ) -> None:
        self.built = build(folder, sources, cache, changes, sanitize, races, flags)
        self.sanitize = sanitize
        self.library = None if sanitize else load(str(self.built.library))

    def run(self, function: str, fields: dict[str, Any], schedule: Schedule = SCHEDULES[0]) -> None:
        """Launch in this process.

        Raises:
            Fault: the kernel broke a rule; the message says where.
        """
        assert self.library is not None, "a sanitized library runs apart"
        struct = self._struct(function, fields)
        size = getattr(self.library, f"simt_size_{function}")()
        assert size == ctypes.sizeof(struct), f"{function}: the struct was read wrongly"
        code, message = launch(self.library, function, schedule.numbers, ctypes.byref(struct))
        if code:
            raise Fault(f"CUDA error {code}: {message}")

    def passes(self, jobs: list[tuple[str, dict[str, Any], Schedule]], *names: str) -> list[float]:
        """How often the launches read and write each of these fields, as a multiple of its size.

        All accesses count, also to bytes that a GPU has in a cache by then. Needs `races=True`.
        """
        assert self.library is not None, "a sanitized library runs apart"
        tensors = [jobs[0][1][name] for name in names]
        for tensor in tensors:
            size = ctypes.c_size_t(tensor.numel() * tensor.element_size())
            self.library.simt_watch(ctypes.c_void_p(tensor.data_ptr()), size)
        for job in jobs:
            self.run(*job)
        counts = (ctypes.c_uint64 * (2 * len(names)))()
        self.library.simt_watched(counts)
        return [
            (counts[2 * i] + counts[2 * i + 1]) / (tensor.numel() * tensor.element_size())
            for i, tensor in enumerate(tensors)
        ]

    def run_apart(self, jobs: list[tuple[str, dict[str, Any], Schedule]]) -> None:
        """Launch (function, fields, schedule) one after the other in a process of their own.

        Raises:
            Fault: a kernel broke a rule, or a sanitizer ended the process.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        launches = [
            (function, schedule.numbers, *self._packed(function, fields, storages))
            for function, fields, schedule in jobs
        ]
        buffers = [ctypes.string_at(s.data_ptr(), s.nbytes()) for s in storages.values()]
        with tempfile.TemporaryDirectory() as folder:
            places = [str(Path(folder) / name) for name in ("jobs", "results")]
            Path(places[0]).write_bytes(pickle.dumps((buffers, launches)))
            worker = str(Path(__file__).parent / "simt_worker.py")
            command = [sys.executable, "-I", "-S", worker, str(self.built.library), *places]
            done = subprocess.run(
                command, env=self._environment(), capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise Fault(f"the process ended with {done.returncode}: {done.stderr}")
            codes, buffers = pickle.loads(Path(places[1]).read_bytes())
        for code, message in codes:
            if code:
                raise Fault(f"CUDA error {code}: {message}")
        for storage, buffer in zip(storages.values(), buffers, strict=True):
            ctypes.memmove(storage.data_ptr(), buffer, len(buffer))

    def _environment(self) -> dict[str, str]:
        if not self.sanitize:
            return dict(os.environ)
        return os.environ | {
            "LD_PRELOAD": sanitizer_library(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }

    def _struct(self, function: str, fields: dict[str, Any]) -> ctypes.Structure:
        return _filled(self.built.structs[self.built.functions[function]], fields)

    def _packed(
        self, function: str, fields: dict[str, Any], storages: dict[int, torch.UntypedStorage]
    ) -> tuple[bytes, list[tuple[int, int, int]]]:
        """The struct for the worker, and which of its pointers is where in which buffer.

        Args:
            storages: the buffers by address; those of this launch are added.
        """
        struct = self._struct(function, fields)
        places = []
        for offset, tensor in _tensors(type(struct), fields):
            storage = tensor.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage)
            buffer = list(storages).index(storage.data_ptr())
            places.append((offset, buffer, tensor.storage_offset() * tensor.element_size()))
        return bytes(struct), places


def _filled(kind: type[ctypes.Structure], fields: dict[str, Any]) -> ctypes.Structure:
    types = dict(kind._fields_)
    assert set(types) == set(fields), f"fields must be {', '.join(types)}"
    struct = kind()
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        elif isinstance(value, dict):
            value = _filled(types[name], value)
        elif isinstance(value, (tuple, list)):
            value = types[name](*value)
        setattr(struct, name, value)
    return struct


def _tensors(
    kind: type[ctypes.Structure], fields: dict[str, Any], start: int = 0
) -> Iterator[tuple[int, torch.Tensor]]:
    """Tensors among the fields, and the offsets of their pointers."""
    types = dict(kind._fields_)
    for name, value in fields.items():
        offset = start + getattr(kind, name).offset
        if isinstance(value, torch.Tensor):
            yield offset, value
        elif isinstance(value, dict):
            yield from _tensors(types[name], value, offset)


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """NaN with the shape and type of another."""
    return torch.full_like(like, torch.nan)
