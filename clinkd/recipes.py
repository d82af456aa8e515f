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


def config_file(path: Path) -> Path:
    """The path of a config as it was given.

    Raises:
        ConfigError: a folder, or no file but a recipe's name; what to write instead.
    """
    if path.is_dir():
        own = path / "config.yaml"
        hint = f"; the config of this run is {own}" if own.is_file() else ""
        raise ConfigError(f"{path} is a folder, not a config{hint}")
    if not path.exists() and path.suffix in ("", ".yaml", ".yml") and path.stem in recipes():
        raise ConfigError(
            f"{path}: there is no such file; copy the recipe of this name first: "
            f"clinkd recipes cp {path.stem}"
        )
    return path


def summary(path: Path) -> str:
    """The first comment line of a config: what it is for."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
