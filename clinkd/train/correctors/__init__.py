"""Who rewrites a weak answer: rules, an OpenAI-compatible endpoint, a local text model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clinkd.errors import ConfigError
from clinkd.train.correction.settings import CorrectorSettings

Progress = Callable[[int, int, str], None]  # done, all, what to show beside them


@dataclass(frozen=True, slots=True)
class Case:
    """A weak answer: what was asked, what the student said, what is true.

    Attributes:
        images: paths relative to the data root; read only where images may be sent.
    """

    id: str
    task: str
    question: str
    answer: str
    truth: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What a corrector made of a case: a text, or why there is none."""

    text: str | None
    why: str | None = None


class Corrector(Protocol):
    """Rewrites answers after the truth; `name` is written into the data."""

    name: str

    def correct(self, cases: Sequence[Case], progress: Progress | None = None) -> list[Reply]:
        """A reply for each case, in their order."""
        ...

    def summary(self) -> str:
        """What the work took, in a few words; empty where it cost nothing."""
        ...


def make_corrector(
    settings: CorrectorSettings,
    *,
    cache: str | Path | None = None,
    data_root: str | Path | None = None,
) -> Corrector:
    """The corrector that the settings name.

    Args:
        cache: file of the replies of models, unless `settings.cache` names one.
        data_root: folder of the images; needed where they may be sent.

    Raises:
        ConfigError, SetupError: a file, key or model that the settings name is missing.
    """
    if settings.kind == "rule":
        from clinkd.train.correctors.rule import RuleCorrector

        return RuleCorrector()
    cache = settings.cache or cache
    if cache is None:
        raise ConfigError(f"corrector kind {settings.kind!r} needs cache, a file for its replies")
    if settings.kind == "local":
        from clinkd.train.correctors.local import LocalCorrector

        return LocalCorrector(settings, cache=Path(cache))
    from clinkd.train.correctors.openai import EndpointCorrector

    return EndpointCorrector(settings, cache=Path(cache), data_root=data_root)
