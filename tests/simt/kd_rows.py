"""Rows of `kd_loss` for the tests that run its CUDA kernels on the CPU, and what must come out."""

import torch
from simt_harness import SCHEDULES

from clinkd.ops._impl import TYPES
from clinkd.ops._kd_loss_native import STATISTICS
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"temperature": 1.0, "divergence": "forward_kl", "mix": 0.3, "softcap": 0.0}
PARTS = ("statistics", "gradient")
NAMES = ("ce", "kd", "gradient")


def make(N, Vs, Vt, dtype=torch.float32, seed=0):
    """Logits of both models, labels with an ignored one, factors of the rows' CE and KD."""
    g = torch.Generator().manual_seed(seed)
    z, t = ((torch.randn(N, V, generator=g) * 3).to(dtype) for V in (Vs, Vt))
    labels = torch.randint(0, Vs, (N,), generator=g)
    labels[1::5] = -100
    return z, t, labels, torch.rand(2, N, generator=g) + 0.5


class Rows:
    """Launches over the same rows: of the statistics and of the gradient, or of other `parts`."""

    def __init__(self, z, t, labels, factors, inplace=False, parts=PARTS, **options):
        self.parts = parts
        options = OPTIONS | options
        self.inputs, self.options = (z.clone(), t, labels, factors), options
        self.ce, self.kd = (torch.full((len(z),), torch.nan) for _ in range(2))
        self.statistics = torch.full((len(z), STATISTICS), torch.nan)
        self.grad = z if inplace else torch.full(z.shape, torch.nan, dtype=z.dtype)
        self.fields = {
            "student": z, "teacher": t, "labels": labels, "rows": len(z),
            "student_columns": z.shape[1], "teacher_columns": t.shape[1],
            "student_stride": z.stride(0), "teacher_stride": t.stride(0), "ignore_index": -100,
            "temperature": options["temperature"], "mix": options["mix"],
            "softcap": options["softcap"], "divergence": DIVERGENCES.index(options["divergence"]),
            "type": TYPES[z.dtype], "ce": self.ce, "kd": self.kd, "statistics": self.statistics,
            "ce_factor": factors[0], "kd_factor": factors[1], "grad": self.grad,
            "grad_stride": self.grad.stride(0), "factor_stride": factors.stride(1),
        }  # fmt: skip

    def jobs(self, schedule=SCHEDULES[0]):
        """The launches."""
        return [(f"kd_{part}_cuda", self.fields, schedule) for part in self.parts]

    @property
    def found(self):
        return self.ce, self.kd, self.grad

    def expected(self, dtype):
        """CE, KD and gradient of the reference in a dtype."""
        z, t, labels, factors = (x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
        z = z.detach().requires_grad_()
        temperature, divergence, mix, softcap = self.options.values()
        ce, kd = kd_loss_rows(
            z, t, labels, temperature=temperature, divergence=divergence, beta=mix, skew=mix,
            ignore_index=-100, softcap=softcap or None,
        )  # fmt: skip
        (grad,) = torch.autograd.grad((ce * factors[0] + kd * factors[1]).sum(), z)
        return ce.detach(), kd.detach(), grad

    def check(self):
        """Float32 to 1e-5 relative; 16-bit types with at most twice plain torch's error."""
        exact = self.expected(torch.float64)
        plain = self.expected(self.grad.dtype)
        rounding = self.options["temperature"] ** 2 * torch.finfo(torch.float32).eps
        for name, a, e, p in zip(NAMES, self.found, exact, plain, strict=True):
            size = e.abs().max().item()
            least = 1e-5 * max(size, 1e-3) + (rounding if name == "kd" else 0.0)
            if a.dtype != torch.float32:
                least = torch.finfo(a.dtype).eps * size
            error = (a - e).abs().max().item()
            assert error <= max(2 * (p - e).abs().max().item(), least), name


def run(machine, *inputs, schedule=SCHEDULES[0], **options):
    rows = Rows(*inputs, **options)
    for job in rows.jobs(schedule):
        machine.run(*job)
    return rows
