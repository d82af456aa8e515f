"""The four losses and small arguments for each."""

import torch

from clinkd.ops import kd_loss, linear_kd_loss, linear_topk_kd_loss, topk_kd_loss

N, C, V, K = 4, 6, 10, 3


def arguments(name):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=g)
    logits = torch.randn(N, V, generator=g)
    hidden, head = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g)
    top = {
        "teacher_logits": torch.randn(N, K, generator=g),
        "teacher_ids": torch.arange(K, dtype=torch.int32).expand(N, K).contiguous(),
        "teacher_lse": torch.full((N,), 4.0),
    }
    student = {"student_hidden": hidden, "student_weight": head}
    return {
        kd_loss: {"student_logits": logits, "teacher_logits": logits.flip(0)},
        linear_kd_loss: student | {"teacher_hidden": hidden.flip(0), "teacher_weight": head},
        topk_kd_loss: {"student_logits": logits} | top,
        linear_topk_kd_loss: student | top,
    }[name] | {"labels": labels}


LOSSES = (kd_loss, linear_kd_loss, topk_kd_loss, linear_topk_kd_loss)
