"""Fused ops for training and answering with vision-language models."""

from clinkd.ops._kd_mean import KDLoss
from clinkd.ops._memory import release_memory
from clinkd.ops.kd_loss import kd_loss
from clinkd.ops.linear_kd_loss import linear_kd_loss
from clinkd.ops.linear_topk_kd_loss import linear_topk_kd_loss
from clinkd.ops.prefix_decode_attention import prefix_decode_attention
from clinkd.ops.rotary import rotary
from clinkd.ops.rotary_append import rotary_append
from clinkd.ops.rotary_attention import rotary_attention
from clinkd.ops.topk_kd_loss import topk_kd_loss

__all__ = [
    "KDLoss",
    "kd_loss",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "prefix_decode_attention",
    "release_memory",
    "rotary",
    "rotary_append",
    "rotary_attention",
    "topk_kd_loss",
]
