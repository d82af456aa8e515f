"""Builds `clinkd._C`: C++ for the CPU, and CUDA C++ where nvcc is found. Needs no torch.

Environment:
    CLINKD_CUDA        1: fail without nvcc; 0: leave CUDA out; unset: whatever is there.
    CLINKD_CUDA_ARCHS  such as "80;90;120", the default; PTX of the last one is added.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_ARCHS = "80;90;120"
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []


def find_nvcc() -> tuple[str, Path] | None:
    """nvcc and the folder of its toolkit; nvcc on the PATH may be a wrapper, so it is asked."""
    choice = os.environ.get("CLINKD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"CLINKD_CUDA must be 0 or 1, got {choice!r}")
    nvcc = None if choice == "0" else shutil.which("nvcc")
    if nvcc is None:
        if choice == "1":
            raise SystemExit("CLINKD_CUDA=1, but there is no nvcc on the PATH")
        return None
    asked = subprocess.run(
        [nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", asked, re.MULTILINE)
    return nvcc, Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


class BuildKernels(build_ext):
    """Compiles the C++ in parallel and hands the .cu files to nvcc."""

    def build_extension(self, ext: Extension) -> None:
        sources = sorted((ROOT / "csrc").glob("*.cpp"))
        cuda_sources = sorted((ROOT / "csrc").glob("*.cu"))
        includes = [pybind11.get_include(), *self.compiler.include_dirs]
        command = [*self.compiler.compiler_so, *CXX_FLAGS, *OPENMP, "-Icsrc"]
        command = [part for part in command if part not in ("-g", "-O2", "-Wstrict-prototypes")]
        linker = shlex.split(os.environ.get("CXX") or "g++")
        require_compilers(command, linker)
        found = find_nvcc()
        archs = (os.environ.get("CLINKD_CUDA_ARCHS") or DEFAULT_ARCHS).replace(",", ";")
        jobs = []
        defines = []
        libraries = list(OPENMP)
        if found is None:
            print("clinkd: no nvcc used, building the CPU kernels only", file=sys.stderr)
        else:
            nvcc, toolkit = found
            includes.append(str(toolkit / "include"))
            defines = ["-DCLINKD_WITH_CUDA", f'-DCLINKD_CUDA_ARCHS="{archs}"']
            libraries += [str(static_runtime(toolkit)), "-ldl", "-lpthread", "-lrt"]
            codes = archs.split(";")
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in codes]
            gencode.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")
            command_cuda = [nvcc, "-O3", "-std=c++17", "-Icsrc", *gencode]
            command_cuda += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            jobs += [(command_cuda, source) for source in cuda_sources]
        command += [*(f"-I{include}" for include in includes), *defines]
        jobs += [(command, source) for source in sources]
        # beside the sources, so that an editable install, a wheel and the next build share them
        kind = f"{sys.implementation.cache_tag}-{'cpu' if found is None else 'cuda'}"
        build = ROOT / "build" / "objects" / kind
        build.mkdir(parents=True, exist_ok=True)
        objects = [str(build / f"{source.name}.o") for _, source in jobs]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            commands = (
                [*start, "-c", str(source), "-o", target]
                for (start, source), target in zip(jobs, objects, strict=True)
            )
            list(pool.map(self._compile, commands))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*linker, "-shared", "-static-libgcc", *objects, "-o", str(target), *libraries]
        run_compiler(link)

    @staticmethod
    def _compile(command: list[str]) -> None:
        """Run a compiler, unless its output is there already, of the same command and sources."""
        output, stamp = Path(command[-1]), Path(f"{command[-1]}.made-of")
        made_of = fingerprint(command)
        if output.exists() and stamp.exists() and stamp.read_text() == made_of:
            return
        stamp.unlink(missing_ok=True)
        run_compiler(command, cwd=ROOT)
        stamp.write_text(made_of)


def run_compiler(command: list[str], cwd: Path | None = None) -> None:
    """Run a compiler or linker; what it says is shown where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"clinkd: {' '.join(command)}\n{done.stdout}{done.stderr}")


def require_compilers(*commands: list[str]) -> None:
    """Raise where a compiler is not installed."""
    for command in commands:
        if shutil.which(command[0]) is None:
            raise SystemExit(
                f"clinkd: there is no {command[0]}: install gcc and g++, or name the compilers in "
                "CC and CXX"
            )


def fingerprint(command: list[str]) -> str:
    """Of what an object is made of: compiler, flags, its source and every header."""
    asked = subprocess.run([command[0], "--version"], capture_output=True, check=False)
    flags = [part for part in command if not part.startswith("-I")]  # pip's folders change
    source = Path(command[command.index("-c") + 1])
    headers = (path for path in (ROOT / "csrc").iterdir() if path.suffix in (".h", ".cuh"))
    parts = [repr(flags).encode(), pybind11.__version__.encode(), asked.stdout]
    parts += [path.read_bytes() for path in (source, *sorted(headers))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def static_runtime(toolkit: Path) -> Path:
    """libcudart_static.a, so that the module imports where no CUDA is installed."""
    for place in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        library = toolkit / place / "libcudart_static.a"
        if library.exists():
            return library
    raise SystemExit(f"clinkd: no libcudart_static.a in {toolkit}; CLINKD_CUDA=0 goes without")


setup(
    # folders of data among them: setuptools warns of each that is not named
    packages=[
        *find_namespace_packages(include=["clinkd", "clinkd.*"], exclude=["*.__pycache__"]),
        "clinkd.configs",
        "clinkd.configs.deepspeed",
    ],
    # the source tree keeps them at its root; clinkd/kernels/__init__.py finds them there
    package_dir={"clinkd.kernels": "kernels", "clinkd.configs": "configs"},
    package_data={
        "clinkd": ["py.typed"],
        "clinkd.data.sample": ["*.jsonl", "images/*.png"],
        "clinkd.report.templates": ["*"],
        "clinkd.configs": ["*.yaml", "deepspeed/*.json"],
    },
    ext_modules=[Extension("clinkd._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
