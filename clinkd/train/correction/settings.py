"""Settings of the corrector; light, since the configuration imports them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class CorrectorSettings(BaseModel):
    """Who rewrites weak answers: rules (default), an OpenAI-compatible endpoint, a local model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rule", "endpoint", "local"] = "rule"
    url: str | None = Field(None, description="endpoint: base URL, as in http://localhost:8000/v1")
    model: str | None = Field(None, description="endpoint: model name; local: folder or name")
    key_env: str | None = Field(None, description="environment variable that holds the key")
    concurrency: int = Field(4, ge=1, le=64, description="calls at a time")
    requests_per_minute: int = Field(60, ge=1)
    timeout: float = Field(60, gt=0, description="seconds a call may take")
    max_tries: int = Field(5, ge=1, description="tries of a call that may be repeated")
    max_calls: int | None = Field(None, ge=1, description="budget of calls; None: no limit")
    max_tokens: int = Field(300, ge=16, description="tokens of a reply")
    max_total_tokens: int | None = Field(None, ge=1, description="budget of all tokens")
    price_per_million: float = Field(0.0, ge=0, description="money for a million tokens")
    max_cost: float | None = Field(None, gt=0, description="budget of money")
    cache: str | None = Field(None, description="file of replies; default: in the run folder")
    offline: bool = Field(False, description="answer from the cache alone, call nobody")

    @model_validator(mode="after")
    def _complete(self) -> "CorrectorSettings":
        if self.kind == "endpoint" and not (self.url and self.model):
            raise ValueError("kind 'endpoint' needs url and model")
        if self.kind == "local" and not self.model:
            raise ValueError("kind 'local' needs model, a folder or name")
        if self.max_cost is not None and not self.price_per_million:
            raise ValueError("max_cost needs price_per_million")
        return self
