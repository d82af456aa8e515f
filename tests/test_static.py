"""The judge of compiled kernels: it reads machine code rightly, and it bites."""

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.static import sass
from benchmarks.static.__main__ import over_budget, rules
from benchmarks.static.cases import SIZES
from benchmarks.static.compiling import (
    CUDA_SOURCES,
    NVCC_FLAGS,
    Figures,
    cuda_name,
    dynamic_shared,
)
from benchmarks.static.limits import occupancy
from benchmarks.static.traffic import VOCABULARY, Traffic, traffics

ROOT = Path(__file__).parent.parent
LISTING = """
\t\tFunction : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.SIN R3, R4 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @!P0 MUFU.EX2 R5, R6 ;
        /*0040*/                   LDL R7, [R1] ;
        /*0050*/              @P1  BRA 0x20 ;
        /*0060*/                   BRA 0x60 ;
"""
FOUND = Figures(100, 0, 0, 1024, 50, 10, 2, 5, 100, 10, 4, 0, 0, 0)


def test_reads_loops_and_special_functions():
    code = sass.parse(LISTING)["kernel"]
    assert [i.opcode for i in code][:2] == ["MOV", "MUFU.SIN"]
    main = sass.main_loop(code)
    assert main is not None
    assert (main.instructions, main.mma, main.special) == (4, 1, {"EX2": 1})
    assert sass.mix(code).sine_cosine == 1


def test_a_spill_is_caught():
    for spill in ({"stack": 8}, {"local": 2}):
        assert "spills" in rules(dataclasses.replace(FOUND, **spill), False, None)[0]


@pytest.mark.parametrize(("fences", "serial"), [(2, False), (4, True)])
def test_products_that_wait_for_one_another_are_caught(fences, serial):
    body = ["WARPGROUP.ARRIVE"] * fences + ["HGMMA.64x64x16.F32.BF16 R4, R8, gdesc[UR8], R4"] * 4
    lines = [f"        /*{16 * i:04x}*/   {text} ;" for i, text in enumerate([*body, "BRA 0x0"])]
    code = sass.parse("\t\tFunction : kernel\n" + "\n".join(lines))["kernel"]
    (loop,) = sass.loops(code)
    assert sass.is_serial(loop) == serial
    assert not sass.is_serial(sass.loops(sass.parse(LISTING)["kernel"])[0])
    assert "wait for one" in rules(dataclasses.replace(FOUND, loops_serial=1), True, None)[0]


def test_a_sine_in_a_loop_and_a_longer_loop_are_caught():
    assert rules(FOUND, True, FOUND) == []
    assert (
        "sines and cosines" in rules(dataclasses.replace(FOUND, loops_sine_cosine=1), True, None)[0]
    )
    assert rules(dataclasses.replace(FOUND, loop=102), True, FOUND) == []
    assert "without rotation" in rules(dataclasses.replace(FOUND, loop=103), True, FOUND)[0]


@pytest.mark.parametrize(
    "worse", [{"registers": 101}, {"stack": 8}, {"shared": 2048}, {"occupancy": 25}, {"mma": 9}]
)
def test_a_budget_exceeded_is_named(worse):
    budget = dataclasses.asdict(FOUND)
    assert over_budget(FOUND, budget) == []
    (name,) = worse
    assert over_budget(dataclasses.replace(FOUND, **worse), budget)[0].startswith(f"{name} ")


def test_names_of_cuda_kernels():
    symbol = "_ZN6clinkd20kd_statistics_kernelI13__nv_bfloat16Li8ELi2EEEvNS_6KDArgsE"
    assert cuda_name(symbol) == "kd_statistics_kernel bf16 ×8 kind 2"
    assert cuda_name("main") == "main"


def test_shared_memory_of_a_launch_is_the_kernels_own():
    compiled = pytest.importorskip("clinkd._C")
    for dtype, size in SIZES.items():
        asked = dynamic_shared(f"kd_cluster_kernel {dtype} ×{16 // size} kind 1")
        assert asked == compiled.kd_cluster_bytes(VOCABULARY, size)
    assert dynamic_shared("kd_statistics_kernel bf16 ×8 kind 1") == 0


def test_flags_are_those_of_the_build():
    text = (ROOT / "setup.py").read_text()
    found = re.search(r"command_cuda = \[nvcc, (.*?), \*gencode\]", text)
    assert found is not None
    assert found[1] == ", ".join(f'"{flag}"' for flag in NVCC_FLAGS)
    assert {p.name for p in (ROOT / "csrc").glob("*.cu")} == set(CUDA_SOURCES)


def test_occupancy_by_hand():
    # 128 registers × 32 lanes = 4,096 of a quarter's 16,384: 4 warps each, 16 of 64
    assert occupancy(80, 128, 0, 4) == 25
    # 64 KB + 1 KB of 164: two blocks of 4 warps
    assert occupancy(80, 32, 64 << 10, 4) == 12


def test_no_op_moves_more_than_it_may():
    assert all(each.ratio <= each.most for each in traffics())
    assert Traffic("x", 3.0, 2.0, 1.05).ratio == 1.5
