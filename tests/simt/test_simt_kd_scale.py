"""A gradient times a number, kd_scale, with the SIMT harness as the GPU."""

import pytest
import torch
from kd_rows import DTYPES, Rows, make


@pytest.mark.parametrize("columns", [600, 601, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(simt, dtype, columns):
    machine = simt("kd_scale.cu")
    z, t, labels, _ = make(5, columns, columns, dtype)
    for factor in (1.0, 0.3, -2.0, torch.nan):
        factors = torch.tensor([factor]).expand(2, 1)
        rows = Rows(z.clone(), t, labels, factors, inplace=True, parts=("scale",))
        machine.run(*rows.jobs()[0])
        expected = z if factor == 1 else (z.float() * factor).to(dtype)
        assert torch.equal(rows.grad.nan_to_num(7), expected.nan_to_num(7))
