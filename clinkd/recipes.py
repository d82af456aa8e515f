"""The configs that come with the package."""

import difflib
from pathlib import Path

from clinkd.errors import ConfigError

_HERE = Path(__file__).parent
# beside the package in the source tree, inside it in a wheel
FOLDERS = (_HERE / "configs", _HERE.parent / "configs")


def recipes() -> dict[str, Path]:
    """Name to file of every shipped config."""
    for folder in FOLDERS:
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def recipe(name: str) -> Path:
    """The file of one config.

    Raises:
        ConfigError: no such config; the nearest name.
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no recipe {name!r}{hint} (known: {', '.join(known)})")
    return known[name]


def summary(path: Path) -> str:
    """The first comment line of a config: what it is for."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
