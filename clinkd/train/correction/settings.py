"""Settings of the corrector; light, since the configuration imports them."""

import re
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(ge=0)]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class CorrectorSettings(BaseModel):
    """Who rewrites weak answers: rules (default), an OpenAI-compatible endpoint, a local model.

    No text leaves this machine unless `kind` is `endpoint` and `url` says where to; no image unless
    `send_images` is set as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    kind: Literal["rule", "endpoint", "local"] = "rule"
    url: str | None = Field(None, description="endpoint: base URL, as in http://localhost:8000/v1")
    model: str | None = Field(None, description="endpoint: model name; local: folder or .gguf file")
    key_env: str | None = Field(
        None, description="endpoint: name of the environment variable that holds the key"
    )
    temperature: float = Field(0.0, ge=0, le=2, description="endpoint; 0: always the same reply")
    max_tokens: int = Field(300, ge=16, description="most tokens of a reply")
    json_mode: bool = Field(True, description="endpoint: ask for response_format json_object")
    parameters: dict[str, Any] = Field(
        {}, description="endpoint: more keys of the request; null takes one of ours away"
    )
    send_images: bool = Field(False, description="endpoint: send the images as well")
    image_side: int = Field(768, ge=28, description="images are shrunk to this many pixels a side")

    concurrency: int = Field(4, ge=1, le=64, description="endpoint: calls at a time")
    batch_size: PositiveInt = Field(8, description="local: answers at a time")
    requests_per_minute: PositiveInt = 60
    tokens_per_minute: PositiveInt | None = Field(None, description="sent and received")
    timeout: float = Field(60, gt=0, description="seconds that one try of a call may take")
    max_tries: PositiveInt = Field(6, description="tries of a call that may be repeated")
    max_wait: float = Field(
        120, gt=0, description="longest pause in seconds; a server that asks for more is given up"
    )
    max_failures: PositiveInt = Field(
        5, description="failed calls in a row after which the work stops"
    )

    max_calls: PositiveInt | None = Field(None, description="budget: tries of calls, of all rounds")
    max_total_tokens: PositiveInt | None = Field(None, description="budget: sent and received")
    max_cost: float | None = Field(None, gt=0, description="budget: money, in the prices' currency")
    input_price: Price = Field(0.0, description="money for a million tokens sent")
    output_price: Price = Field(0.0, description="money for a million tokens received")

    cache: str | None = Field(None, description="file of replies; default: in the run folder")
    offline: bool = Field(False, description="answer from the cache alone, call nobody")
    dry_run: bool = Field(False, description="print what the calls would cost, then stop")

    @model_validator(mode="after")
    def _complete(self) -> "CorrectorSettings":
        if self.kind == "endpoint":
            if not self.url or not self.model:
                raise ValueError("kind 'endpoint' needs url and model")
            _check_url(self.url, bool(self.key_env))
        if self.kind == "local" and not self.model:
            raise ValueError("kind 'local' needs model, a folder or a .gguf file")
        # checked here, where an error does not repeat the value: it may be the key itself
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise ValueError(
                "key_env must be the name of an environment variable, never the key itself"
            )
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("max_cost needs input_price and output_price")
        if (self.offline or self.dry_run) and self.kind != "endpoint":
            raise ValueError(f"offline and dry_run are for kind 'endpoint', not {self.kind!r}")
        if self.offline and self.dry_run:
            raise ValueError("offline and dry_run exclude each other")
        return self


def _check_url(url: str, has_key: bool) -> None:
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
        # what every call would stumble over
        (parts.hostname or "").encode("idna")
        if not parts.path.isascii() or " " in url or not url.isprintable():
            raise ValueError
    except ValueError:
        raise ValueError("url is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise ValueError("url must be written http://host/v1 or https://host/v1")
    if parts.username or parts.password:
        raise ValueError("url must not hold a name or password; use key_env")
    if parts.query or parts.fragment:
        raise ValueError("url must end with its path, without '?' and '#'")
    if has_key and parts.scheme == "http" and not is_here(parts.hostname):
        raise ValueError("a key would travel unencrypted: use https, or leave key_env out")


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
