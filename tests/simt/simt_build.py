"""Compiles the CUDA sources of csrc/ as plain C++ into a shared library, cached by content."""

import contextlib
import ctypes
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-g1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZERS += ["-fno-omit-frame-pointer"]
# calls at every access to memory, which races.cpp answers, without that sanitizer's own library
RACES = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-nodefaultlibs"]
RACES += ["-Wl,--no-undefined", "-lstdc++", "-lm", "-lc", "-lgcc_s"]
SCALARS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "int": ctypes.c_int}
ENTRY = re.compile(r"^int (\w+_cuda)\(const (\w+)& args, void\* stream\) \{", re.MULTILINE)
BARRIER = re.compile(r"__syncthreads\(\)|\bcluster\.sync\(\)")


@dataclass(frozen=True)
class Change:
    """A fault planted in the copy of a source: `old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Build:
    """A compiled library: its functions, and the structs that they take."""

    library: Path
    functions: dict[str, str]  # name of each and of its struct
    structs: dict[str, type[ctypes.Structure]]
    barriers: tuple[str, ...]  # "file:line" of each in the sources


def build(
    folder: Path,
    sources: tuple[str, ...],
    cache: Path,
    changes: tuple[Change, ...] = (),
    sanitize: bool = False,
    races: bool = False,
    flags: tuple[str, ...] = ("-O1",),
) -> Build:
    """Compile `sources`, .cu files of `folder`, with the headers beside them.

    Raises:
        RuntimeError: what the compiler says.
    """
    texts = _with_headers(folder, sources)
    for change in changes:
        assert texts[change.file].count(change.old) == 1, f"{change} does not fit once"
        texts[change.file] = texts[change.file].replace(change.old, change.new)
    functions = {name: args for source in sources for name, args in ENTRY.findall(texts[source])}
    structs = {args: _struct(args, texts) for args in functions.values()}
    every = ["g++", *FLAGS, f"-I{HERE / 'include'}", *(SANITIZERS if sanitize else ())]
    own = "".join(path.read_text(encoding="utf-8") for path in _own_files())
    compiled = [*every, *flags, "-r", *(str(HERE / name) for name in ("runtime.cpp", "races.cpp"))]
    runtime = _made(cache, [own, *compiled], "runtime.o", {}, lambda _: compiled)
    kernels = [*every, *flags, *(RACES if races else ()), "-shared"]

    def link(place: Path) -> list[str]:
        units = [str(place / source) for source in sources]
        return [*kernels, "-x", "c++", *units, "-x", "none", str(runtime)]

    written = {name: _translated(text, _entries(text)) for name, text in texts.items()}
    library = _made(cache, [own, *kernels, *sources], "kernels.so", written, link)
    return Build(library, functions, structs, tuple(_barriers(texts)))


@lru_cache(maxsize=1)
def sanitizer_library() -> str:
    """The address sanitizer's, which a process must load first."""
    found = _run(["g++", "-print-file-name=libasan.so"]).strip()
    return str(Path(found).resolve())


def _with_headers(folder: Path, sources: tuple[str, ...]) -> dict[str, str]:
    """Text of the sources and of all that they include from their folder, by name."""
    texts: dict[str, str] = {}
    todo = list(sources)
    while todo:
        name = todo.pop()
        if name not in texts:
            texts[name] = (folder / name).read_text(encoding="utf-8")
            todo += re.findall(r'^#include "(.+)"', texts[name], re.MULTILINE)
    return texts


def _own_files() -> list[Path]:
    names = ("runtime.cpp", "races.cpp", "machine.h", "fiber.h")
    return [*(HERE / name for name in names), *sorted((HERE / "include").iterdir())]


def _made(
    cache: Path,
    parts: list[str],
    name: str,
    texts: dict[str, str],
    command: Callable[[Path], list[str]],
) -> Path:
    """A file that a command makes in a folder with these texts; kept by all that goes into it."""
    content = "\0".join([*parts, *(part for text in texts.items() for part in text)])
    place = cache / hashlib.sha256(content.encode()).hexdigest()[:24]
    if not place.exists():
        half = Path(tempfile.mkdtemp(dir=cache))
        for file, text in texts.items():
            (half / file).write_text(text, encoding="utf-8")
        _run([*command(half), "-o", str(half / name)])
        with contextlib.suppress(OSError):  # another process was first
            half.rename(place)  # whole or absent
    return place / name


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _translated(text: str, entries: str) -> str:
    """The source with shared memory as the harness has it, line for line, and its entries."""
    text = re.sub(
        r"extern __shared__ ([\w:]+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(simt::dynamic_place());",
        text,
    )
    text = re.sub(
        r"__shared__ ([\w:<>, ]+?) (\w+)((?:\[[^\]]*\])*);",
        r'auto& \2 = simt::shared<\1\3>(SIMT_SITE " \2");',
        text,
    )
    return text + entries


def _entries(text: str) -> str:
    """C functions around those of a source, and the sizes of their structs."""
    lines = []
    for name, args in ENTRY.findall(text):
        lines.append(f'extern "C" int simt_{name}(const clinkd::{args}* args) {{')
        lines.append(f"  return clinkd::{name}(*args, nullptr);\n}}")
        lines.append(f'extern "C" size_t simt_size_{name}() {{ return sizeof(clinkd::{args}); }}')
    return "\n".join(lines) + "\n" if lines else ""


def _struct(name: str, texts: dict[str, str]) -> type[ctypes.Structure]:
    """A struct of plain fields and such structs, as a header declares it."""
    bodies = [re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL) for text in texts.values()]
    (body,) = [found[1] for found in bodies if found]
    fields = []
    for declaration in re.sub(r"//.*", "", body).split(";"):
        if not declaration.strip():
            continue
        kind, names = re.fullmatch(r"\s*((?:const )?\w+\*?)\s+(.*)", declaration).groups()
        if kind.endswith("*"):
            base = ctypes.c_void_p
        else:
            base = SCALARS[kind] if kind in SCALARS else _struct(kind, texts)
        for field in names.split(","):
            word, size = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?\s*", field).groups()
            fields.append((word, base * int(size) if size else base))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _barriers(texts: dict[str, str]) -> list[str]:
    return [
        f"{name}:{number}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if BARRIER.search(line)
    ]
