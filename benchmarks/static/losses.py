"""Distillation losses of others beside ours: bytes, operations, memory.

Each runs forward and backward on tensors without data (`meta`) of Qwen2-VL-2B's vocabulary under
`counted.Counter`. Where it starts a Triton kernel, a stand-in counts what that kernel's source
loads and stores. torch.compile, which Liger's chunked loss uses by default, is off: its operations
are counted one by one.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.static.counted import Counter
from benchmarks.static.traffic import VOCABULARY
from clinkd.ops._kd_mean import mean_rows
from clinkd.ops._row_chunks import RowChunks, chunk_rows

ROWS, WIDTH = 8192, 1536
OPTIONS = (2.0, 0, 0.5, -100, 0.0, "cuda")  # T = 2, forward KL
Step = Callable[[Counter], None]


def _meta(*shape: int, learns: bool = False) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=learns)


def _labels() -> Tensor:
    return torch.empty(ROWS, dtype=torch.int64, device="meta")


def _heads() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and head, which learn, and the teacher's."""
    student = (_meta(ROWS, WIDTH, learns=True), _meta(VOCABULARY, WIDTH, learns=True))
    return (*student, _meta(ROWS, WIDTH), _meta(VOCABULARY, WIDTH))


def our_logits(counter: Counter) -> None:
    student, teacher = _meta(ROWS, VOCABULARY, learns=True), _meta(ROWS, VOCABULARY)
    labels = _labels()
    with counter:
        ce, kd, _ = torch.ops.clinkd.kd_rows(student, teacher, labels, *OPTIONS)
        loss = mean_rows(ce, kd, 0.5, None, ROWS).loss
        torch.autograd.grad(loss, student)


def trl_logits(counter: Counter) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trainer = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher = _meta(1, ROWS, VOCABULARY, learns=True), _meta(1, ROWS, VOCABULARY)
    with counter:
        loss = trainer.generalized_jsd_loss(student, teacher, beta=0.0, temperature=2.0)
        torch.autograd.grad(loss, student)


def our_hidden(counter: Counter) -> None:
    hidden, head, teacher, teacher_head = _heads()
    labels = _labels()

    def score(part: slice, logits: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        target = torch.nn.functional.linear(teacher[part], teacher_head)
        ce, kd, statistics = torch.ops.clinkd.kd_rows(logits, target, labels[part], *OPTIONS)
        factor = torch.ones_like(ce)
        sums = torch.stack([(ce * factor).sum(), (kd * factor).sum()])
        # `gradient_in_place`, the same kernel as of kd_rows_backward
        counter.kernel([logits, target, statistics, factor, factor, labels[part]], [logits])
        return sums, logits

    rows = chunk_rows("auto", head, teacher_head)
    with counter:
        loss, _ = RowChunks.apply(hidden, head, None, score, 0.5, rows, len(head), "", True)
        torch.autograd.grad(loss, (hidden, head))


def liger_fused(counter: Counter) -> None:
    module = importlib.import_module("liger_kernel.ops.fused_linear_jsd")

    def jsd(_: str, log_q: Tensor, log_p: Tensor, *__: Any, **___: Any) -> tuple[Tensor, Tensor]:
        loss = torch.zeros(log_q.shape, dtype=torch.float32, device="meta")
        counter.kernel([log_q, log_p], [loss, log_q])
        return loss, log_q

    def project(inputs: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(inputs, weight.t(), out_dtype=torch.float32)  # as it does on a GPU

    with (
        mock.patch.object(module, "dispatch", jsd),
        mock.patch.object(module, "_project_to_float32", project),
        counter,
    ):
        # gradients are made here; its backward pass leaves them as they are
        module.fused_linear_jsd_forward(*_heads(), None, 0.5, -100, False, 2.0)


def liger_chunked(counter: Counter) -> None:
    module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    loss = module.LigerFusedLinearJSDLoss(beta=0.0, temperature=2.0, compiled=False)
    inputs = (*_heads(), _labels())
    with counter:
        loss(*inputs)


def fla_fused(counter: Counter) -> None:
    module = importlib.import_module("fla.modules.fused_kl_div.ops")

    def kernel(logits: Tensor, target_logits: Tensor, loss: Tensor, **_: Any) -> None:
        # both are read for their sums, and again for the gradient that takes the logits' place
        counter.kernel([logits, target_logits] * 2, [logits, loss], passes=2)

    launcher = mock.MagicMock()
    launcher.__getitem__.return_value = kernel
    hidden, head, teacher, teacher_head = _heads()
    with mock.patch.object(module, "kl_div_kernel", launcher), torch.no_grad(), counter:
        module.fused_kl_div_fwd(hidden, teacher, head, teacher_head)


LOGITS: dict[str, tuple[str, Step]] = {
    "clinkd kd_loss": ("clinkd", our_logits),
    "TRL generalized_jsd_loss, beta 0": ("trl", trl_logits),
}
HIDDEN: dict[str, tuple[str, Step]] = {
    "clinkd linear_kd_loss": ("clinkd", our_hidden),
    "Liger fused linear JSD": ("liger_kernel", liger_fused),
    "Liger chunked loss, CE and KL": ("liger_kernel", liger_chunked),
    "fla fused KL": ("fla", fla_fused),
}


HEADS = {"moved": "bytes", "products": "products", "elements": "elements", "most": "memory"}


def report() -> None:
    """Print both tables, and in what ours needs more than a peer."""
    for given, steps in (("logits", LOGITS), ("hidden states", HIDDEN)):
        title = f"loss of {given}, {ROWS:,} rows of {VOCABULARY:,}, bf16"
        print(f"\n{title:50} {'GB':>8} {'TFLOP':>8} {'1e9 elements':>13} {'MiB held':>9}")
        found: dict[str, Counter] = {}
        for name, (package, step) in steps.items():
            if importlib.util.find_spec(package) is None:
                print(f"{name:50} {package} is not installed")
                continue
            found[name] = counter = Counter()
            step(counter)
            print(
                f"{name:50} {counter.moved / 1e9:8.2f} {counter.products / 1e12:8.2f} "
                f"{counter.elements / 1e9:13.2f} {counter.most / 2**20:9.0f}"
            )
        (_, ours), *others = found.items()
        for name, counter in others:
            more = [
                title for key, title in HEADS.items() if getattr(ours, key) > getattr(counter, key)
            ]
            if more:
                print(f"ours has more than {name}: {', '.join(more)}")
