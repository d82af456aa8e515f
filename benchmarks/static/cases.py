"""Every Triton kernel with the constants of the launches that it gets, by architecture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clinkd.kernels import linear_kd_gradient as gradient
from clinkd.kernels import linear_kd_loss as loss
from clinkd.kernels import linear_kd_tiles as loss_tiles
from clinkd.kernels import prefix_decode_attention as prefix
from clinkd.kernels import rotary_attention as forward
from clinkd.kernels import rotary_attention_backward as backward
from clinkd.kernels import rotary_attention_keys as keys
from clinkd.kernels import rotary_blocks as tiles
from clinkd.ops.reference.kd_loss import DIVERGENCES

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
WITHOUT = " without rotation"  # ends the name of a twin in which rotation is compiled out


@dataclass(frozen=True)
class Case:
    """One kernel with the constants of one launch.

    Attributes:
        types: of arguments that are no constants; "i32:16" is a multiple of 16, as pointers are.
        attention: whether the rule holds that no loop has a sine or cosine.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    stages: int
    attention: bool = False


def cases(arch: int, every: bool = False) -> Iterator[Case]:
    """Shapes of Qwen2-VL-2B: 12 / 2 heads of 128, hidden size 1,536, and other sizes of heads.

    Args:
        every: float32 heads of all sizes too, slow to compile; they have no budgets.
    """
    if every:
        for head_dim in (32, 64, 96, 112, 256):
            yield from _attention_cases(arch, "fp32", head_dim)
    yield from _prefix_cases(arch)
    for head_dim in (32, 64, 80, 96, 128, 256):
        yield from _attention_cases(arch, "bf16", head_dim)
    for head_dim in (64, 80, 128):
        yield from _attention_cases(arch, "bf16", head_dim, ROTATE=False)
    packed = {"PACKED": True, "CAUSAL": False, "SEQUENCES": 8, "G": 1}  # of a vision tower
    yield from _attention_cases(arch, "bf16", 80, " packed full", **packed)
    packed |= {"CAUSAL": True, "G": 6}  # of language layers
    for head_dim in (64, 96, 128):
        yield from _attention_cases(arch, "bf16", head_dim, " packed", **packed)
    yield from _attention_cases(arch, "bf16", 128, " window", WINDOW=1024)
    yield from _attention_cases(arch, "fp16", 128)
    for head_dim in (80, 128):
        yield from _attention_cases(arch, "fp32", head_dim)
    yield _parts_case(arch)
    for dtype in ("bf16", "fp32"):
        for divergence in range(len(DIVERGENCES)):
            yield from _loss_cases(arch, dtype, divergence)
            yield from _loss_cases(arch, dtype, divergence, softcap=30.0, biased=True)
    yield from _loss_cases(arch, "bf16", biased=True)
    yield from _loss_cases(arch, "bf16", whole=False)
    yield from _loss_cases(arch, "fp16", softcap=30.0, biased=True)


def _prefix_cases(arch: int) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for rows in (16, 32, 54, 128):
            tile = prefix.tile(rows, SIZES[dtype], arch)
            warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
            shape = dict(PREFIX_PIECES=16, Hkv=2, G=6, D=128, PIECE=128, BLOCK_D=128)
            own = {
                "prefix_lengths_ptr": "*i32",
                "suffix_lengths_ptr": "*i32",
                "visible_ptr": "*u8",
                "piece_out_ptr": "*fp32",
                "piece_lse_ptr": "*fp32",
                "scale": "fp32",
            }
            constants = {**shape, "UPCAST": False, **tile}
            types = _types(prefix._piece_kernel, constants, own, dtype)
            name = f"prefix_decode_attention {dtype} rows {rows}"
            yield Case(name, prefix._piece_kernel, constants, types, warps, stages, True)
    constants = dict(Hkv=2, G=6, D=128, BLOCK_P=32, BLOCK_D=128)
    own = {"piece_out_ptr": "*fp32", "piece_lse_ptr": "*fp32"}
    types = _types(prefix._merge_kernel, constants, own, "bf16")
    yield Case("prefix_decode_attention merge", prefix._merge_kernel, constants, types, 1, 3)


def _attention_cases(
    arch: int, dtype: str, head_dim: int, more: str = "", **other: Any
) -> Iterator[Case]:
    size = SIZES[dtype]
    for part, kernel, blocks, owns_rows in (
        ("forward", forward._forward_kernel, tiles.forward_blocks(head_dim, size, arch), True),
        ("keys", keys.keys_kernel, tiles.keys_blocks(head_dim, size, arch), False),
        ("queries", backward._queries_kernel, tiles.queries_blocks(head_dim, size, arch), True),
    ):
        first, second = tiles.pieces(head_dim, blocks.whole)
        constants = {
            "G": 6,
            "D": head_dim,
            "R": head_dim // 2,
            "PAIR_STRIDE": head_dim // 2,
            "D0": first,
            "D1": second,
            "CAUSAL": True,
            "WINDOW": 0,
            "PACKED": False,
            "SEQUENCES": 1,
            "PARTS": 1,
            "ROTATE": True,
            "KEEP": True,
            "NARROW": blocks.narrow,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "UPCAST": False,
            "BLOCK_M": blocks.rows if owns_rows else blocks.columns,
            "BLOCK_N": blocks.columns if owns_rows else blocks.rows,
            "position_stride_s": 1,  # Triton makes a constant of a 1
            **other,
        }
        floats = ("lse_ptr", "delta_ptr", "level_ptr", "positions_ptr", "hi_ptr", "lo_ptr")
        own = dict.fromkeys(floats, "*fp32")
        own |= {"axis_ptr": "*i32", "factor": "fp32", "scale": "fp32"}
        if constants["PACKED"]:
            own |= {"starts_ptr": "*i32", "key_starts_ptr": "*i32"}
        else:
            constants |= {"starts_ptr": None, "key_starts_ptr": None}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        types = _types(kernel, constants, own, dtype)
        twin = "" if constants["ROTATE"] else WITHOUT
        name = f"rotary_attention {part} {dtype} head_dim {head_dim}{more}{twin}"
        yield Case(name, kernel, constants, types, blocks.warps, blocks.stages, True)


def _parts_case(arch: int) -> Case:
    constants = dict(D=128, R=64, PAIR_STRIDE=64, PARTS=6, WIDTH=128, BLOCK=backward.SUM_ROWS)
    own = dict.fromkeys(
        ("parts_k_ptr", "parts_v_ptr", "positions_ptr", "hi_ptr", "lo_ptr"), "*fp32"
    )
    kernel = keys.sum_parts_kernel
    types = _types(kernel, constants, {**own, "axis_ptr": "*i32"}, "bf16")
    return Case("rotary_attention sum of parts head_dim 128", kernel, constants, types, 4, 3)


def _loss_cases(
    arch: int,
    dtype: str,
    divergence: int = 0,
    *,
    softcap: float = 0.0,
    biased: bool = False,
    whole: bool = True,
) -> Iterator[Case]:
    """`whole`: the widths of the hidden states are multiples of a block's."""
    own = dict.fromkeys(("out_ptr", "statistics_ptr", "factor_ptr", "picked_ptr"), "*fp32")
    own |= dict.fromkeys(("inverse_temperature", "kd_factor", "mix"), "fp32")
    own |= dict.fromkeys(("Cs", "Ct", "Vs", "common", "begin", "N"), "i32:16")
    own["labels_ptr"] = "*i64"
    kernels = {"statistics": loss.statistics_kernel, "gradient": gradient.gradient_kernel}
    if divergence > 1:
        kernels["divergence"] = loss.divergence_kernel
    plain = divergence < 2 and not softcap and not biased
    more = [f", softcap {softcap:g}"] * bool(softcap) + [", bias"] * biased
    more += [", odd width"] * (not whole)
    what = DIVERGENCES[divergence].replace("_", " ") + "".join(more)
    for part, kernel in kernels.items():
        options = loss_tiles.blocks(SIZES[dtype], arch, part, plain)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        found = {
            "DIVERGENCE": divergence,
            "SOFTCAP": softcap,
            "STUDENT_WHOLE": whole,
            "TEACHER_WHOLE": whole,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "UPCAST": False,
            **options,
        }
        if not biased:
            found |= {"student_bias_ptr": None, "teacher_bias_ptr": None}
        types = _types(kernel, found, own, dtype)
        yield Case(f"linear_kd_loss {part} {dtype} {what}", kernel, found, types, warps, stages)


def _types(
    kernel: Any, constants: dict[str, Any], own: dict[str, str], dtype: str
) -> dict[str, str]:
    """Of every argument that is no constant: pointers to `dtype`, strides multiples of 16."""

    def default(name: str) -> str:
        if name.endswith("_ptr"):
            return f"*{dtype}"
        aligned = "stride" in name and "lse" not in name and "position" not in name
        return "i32:16" if aligned else "i32"

    return {n: own.get(n) or default(n) for n in kernel.arg_names if n not in constants}
