"""From a YAML file and `key=value` overrides to a checked configuration, and back."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clinkd.config.sections import RunConfig
from clinkd.errors import ConfigError


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides, check every key and value.

    Raises:
        ConfigError: the key at fault, what is allowed there, and the nearest known key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        tree = yaml.load(text, _OneOfEach) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, not a {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return check(tree, source=str(path))


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} must be written key=value, as in distill.epochs=3"
        )
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # a heading with nothing under it
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    if _kind_of(parents, last) in (str, str | None):
        node[last] = _text(value)
        return
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value") from None


def _text(value: str) -> Any:
    """A text as YAML has it, or as it stands where YAML would see something else in it.

    It ends "run #2" at the #, and takes 2025 for a number and "a: b" for a mapping. What it calls
    nothing, true or false is no text to us either.
    """
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    quoted = value.lstrip()[:1] in ("'", '"')
    is_whole = isinstance(found, str) and (quoted or " #" not in value)
    return found if is_whole or found is None or isinstance(found, bool) else value


def _kind_of(parents: Sequence[str], last: str) -> Any:
    """The type of a key's value; None where there is no such key."""
    section = _section_at(parents)
    field = section.model_fields.get(last) if section is not None else None
    return None if field is None else field.annotation


def check(tree: dict[str, Any], source: str = "configuration") -> RunConfig:
    """Turn a tree of keys and values into a checked configuration."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(problems)) from None


def _explain(error: Any) -> str:
    """One sentence for one pydantic error: the key, what it was, what is allowed."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}{hint} (known here: {', '.join(known)})"
    given = error.get("input")
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(given, str) and error["type"] == "literal_error":
        expected = [
            part.strip(" '") for part in error["ctx"]["expected"].replace(" or ", ", ").split(",")
        ]
        near = difflib.get_close_matches(given, expected, n=1, cutoff=0.5)
        message += f"; did you mean {near[0]!r}?" if near else ""
    shown = "" if isinstance(given, dict | BaseModel) else f", got {given!r}"
    return f"{key or 'settings'}: {message}{shown}"


def _keys_at(location: Sequence[str]) -> list[str]:
    section = _section_at(location)
    return [] if section is None else list(section.model_fields)


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = RunConfig
    for part in location:
        field = model.model_fields.get(part)
        annotation = None if field is None else field.annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
