"""Builds `clinkd._C`: C++ for the CPU, and CUDA C++ where nvcc is found. Needs no torch.

nvcc is looked for on the PATH, in CUDA_HOME, CUDA_PATH and /usr/local/cuda.

Environment:
    CLINKD_CUDA        1: fail without nvcc; 0: leave CUDA out; unset: whatever is there.
    CLINKD_CUDA_ARCHS  such as "80;90;120"; the default is those of them that nvcc knows. PTX of the
                       first and the last is added: a driver makes code of it for other cards.
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
DEFAULT_ARCHS = ["80", "90", "120"]
USUAL = "/usr/local/cuda"
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []


def find_nvcc() -> tuple[str, Path] | None:
    """nvcc and the folder of its toolkit; nvcc on the PATH may be a wrapper, so it is asked."""
    choice = os.environ.get("CLINKD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"CLINKD_CUDA must be 0 or 1, got {choice!r}")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in (*homes, USUAL))])
    nvcc = None if choice == "0" else shutil.which("nvcc", path=path)
    if nvcc is None:
        if choice == "1":
            raise SystemExit(
                f"CLINKD_CUDA=1, but there is no nvcc on the PATH, in CUDA_HOME or in {USUAL}"
            )
        return None
    asked = subprocess.run(
        [nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", asked, re.MULTILINE)
    return nvcc, Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def architectures(nvcc: str) -> list[str]:
    """Which to compile for, such as "80"."""
    asked = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = re.findall(r"^compute_(\d+)$", asked.stdout, re.MULTILINE)
    wanted = re.findall(r"\w+", os.environ.get("CLINKD_CUDA_ARCHS", ""))
    if not known:  # a compiler that lists none says itself what it cannot do
        return wanted or DEFAULT_ARCHS
    if unknown := [arch for arch in wanted if arch.rstrip("af") not in known]:
        raise SystemExit(
            f"CLINKD_CUDA_ARCHS: {nvcc} knows no {', '.join(unknown)}, only {', '.join(known)}"
        )
    found = wanted or [arch for arch in DEFAULT_ARCHS if arch in known]
    if not found:
        raise SystemExit(
            f"clinkd: {nvcc} knows none of sm_{', '.join(DEFAULT_ARCHS)}: a CUDA toolkit of 11.8 "
            "or newer does; CLINKD_CUDA=0 goes without"
        )
    return found


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
        jobs = []
        defines = []
        libraries = list(OPENMP)
        if found is None:
            print("clinkd: no nvcc used, building the CPU kernels only", file=sys.stderr)
        else:
            nvcc, toolkit = found
            archs = architectures(nvcc)
            includes.append(str(toolkit / "include"))
            defines = ["-DCLINKD_WITH_CUDA", f'-DCLINKD_CUDA_ARCHS="{";".join(archs)}"']
            libraries += [str(static_runtime(toolkit)), "-ldl", "-lpthread", "-lrt"]
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            ends = dict.fromkeys((archs[0], archs[-1]))
            gencode += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ends]
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
