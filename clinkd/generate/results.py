"""What a search returns."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """One answer to one question.

    Attributes:
        token_ids: generated tokens, the stop token included where one was reached.
        log_probs: of each token.
        score: sum of `log_probs` over their number to the length penalty.
    """

    text: str
    token_ids: list[int]
    log_probs: list[float]
    score: float

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of the tokens; its exponential is a confidence."""
        return sum(self.log_probs) / max(1, len(self.log_probs))


@dataclass(frozen=True)
class Result:
    """All answers to one request, best first; `error` says why there are none."""

    id: str
    candidates: list[Candidate] = field(default_factory=list)
    error: str | None = None
