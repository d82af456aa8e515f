"""Who rewrites a weak answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from clinkd.train.correction.settings import CorrectorSettings

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Case:
    """A weak answer: what was asked, what the student said, what is true."""

    id: str
    task: str
    question: str
    answer: str
    truth: str


class Corrector(Protocol):
    """Rewrites answers after the truth; `name` is written into the data."""

    name: str

    def correct(self, cases: "Sequence[Case]") -> "list[str | None]":
        """A reply for each case; None where there is none."""
        ...


def make_corrector(settings: CorrectorSettings) -> Corrector:
    """The corrector that the settings name."""
    if settings.kind == "rule":
        from clinkd.train.correctors.rule import RuleCorrector

        return RuleCorrector()
    if settings.kind == "local":
        from clinkd.train.correctors.local import LocalCorrector

        assert settings.model is not None
        return LocalCorrector(settings.model, settings.max_tokens)
    from clinkd.train.correctors.endpoint import EndpointCorrector

    return EndpointCorrector(settings)
