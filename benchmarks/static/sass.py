"""Reads machine code as cuobjdump prints it: instructions, loops, what they are made of."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.M)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
_TENSOR_CORE = re.compile(r"[A-Z]*MMA$")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its suffixes, without its predicate
    operands: str

    @property
    def is_tensor_core(self) -> bool:
        return _TENSOR_CORE.match(self.opcode.split(".")[0]) is not None

    @property
    def special(self) -> str:
        """Kind of a special-function instruction, such as EX2; empty for others."""
        parts = self.opcode.split(".")
        return parts[1] if parts[0] == "MUFU" else ""


@dataclass(frozen=True)
class Mix:
    """Of a stretch of code. `special` by kind: EX2, LG2, RCP, SIN, COS, …"""

    instructions: int
    mma: int
    special: dict[str, int]

    @property
    def sine_cosine(self) -> int:
        return self.special.get("SIN", 0) + self.special.get("COS", 0)


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Instructions of every function of a listing."""
    parts = _FUNCTION.split(listing)
    return {
        name: [Instruction(int(a, 16), opcode, rest) for a, opcode, rest in _LINE.findall(text)]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Every stretch from a backward branch's target to the branch."""
    found = []
    for at in code:
        if at.opcode.split(".")[0] == "BRA" and (target := _TARGET.search(at.operands)):
            begin = int(target[1], 16)
            if begin < at.address:
                found.append([i for i in code if begin <= i.address <= at.address])
    return found


def is_serial(loop: list[Instruction]) -> bool:
    """Whether ptxas has sm_90's products of a loop wait for one another (its note C7515).

    Then each is fenced by WARPGROUP instructions; else they are few for a whole dot.
    """
    opcodes = [instruction.opcode.split(".")[0] for instruction in loop]
    return 0 < opcodes.count("HGMMA") <= opcodes.count("WARPGROUP")


def mix(code: list[Instruction]) -> Mix:
    special: dict[str, int] = {}
    for instruction in code:
        if kind := instruction.special:
            special[kind] = special.get(kind, 0) + 1
    return Mix(len(code), sum(i.is_tensor_core for i in code), special)


def main_loop(code: list[Instruction]) -> Mix | None:
    """The innermost loop with the most tensor-core instructions, else with the most exponentials.

    Of several alike (with and without a mask) the shortest, which runs the most.
    """
    all_loops = loops(code)
    spans = [(loop[0].address, loop[-1].address) for loop in all_loops]
    inner = [
        mix(loop)
        for loop, (a, b) in zip(all_loops, spans, strict=True)
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]
    return max(inner, key=lambda m: (m.mma, m.special.get("EX2", 0), -m.instructions), default=None)


def tool(name: str, *arguments: Any) -> str:
    """Output of one of the binary tools that come with Triton."""
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(binary: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED, … of every function of a binary."""
    parts = re.split(r"Function (\S+):", tool("cuobjdump", "--dump-resource-usage", binary))
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def code(binary: Path) -> dict[str, list[Instruction]]:
    """Instructions of every function of a binary."""
    return parse(tool("cuobjdump", "-sass", binary))
