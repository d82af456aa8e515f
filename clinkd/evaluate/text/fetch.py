"""Stanford's parser for SPICE, taken from a file the user has and kept in a user cache."""

import hashlib
import os
import zipfile
from pathlib import Path, PurePosixPath
from shutil import copyfileobj

from clinkd.errors import ConfigError, DataError, SetupError

SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def cache_folder() -> Path:
    """$CLINKD_CACHE, else clinkd in the user's cache folder."""
    if chosen := os.environ.get("CLINKD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clinkd"


def spice_folder() -> Path:
    """Where SPICE's parser jars are looked for."""
    return cache_folder() / "metrics" / "spice"


def fetch_spice(source: Path, sha256: str) -> list[Path]:
    """Take the two jars out of CoreNLP's zip into the cache, after checking its sum.

    Args:
        source: stanford-corenlp-full-2015-12-09.zip.
        sha256: of that file, 64 hexadecimal digits.

    Raises:
        ConfigError: not a sum.
        DataError: the file cannot be read, has another sum, or lacks a jar.
        SetupError: the cache cannot be written.
    """
    expected = sha256.strip().lower()
    if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
        raise ConfigError(f"--sha256 must be 64 hexadecimal digits, got {sha256!r}")
    try:
        with open(source, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from None
    if found != expected:
        raise DataError(f"{source}: its SHA-256 is {found}, not {expected}; nothing was taken")
    try:
        with zipfile.ZipFile(source) as archive:
            members = {PurePosixPath(name).name: name for name in archive.namelist()}
            missing = [name for name in SPICE_JARS if name not in members]
            if missing:
                raise DataError(f"{source}: holds no {' and no '.join(missing)}")
            return [_take(archive, members[name], spice_folder() / name) for name in SPICE_JARS]
    except zipfile.BadZipFile as error:
        raise DataError(f"{source}: not a whole zip file: {error}") from None
    except OSError as error:
        raise SetupError(f"{spice_folder()}: cannot be written: {error.strerror}") from None


def _take(archive: zipfile.ZipFile, member: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with archive.open(member) as source, open(partial, "wb") as out:
            copyfileobj(source, out)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
