"""Whether a checkpoint had all the weights of its model."""

from typing import Any

from clinkd.errors import ConfigError


def require_weights(name: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose missing weights transformers has made up, with a warning.

    Args:
        info: what `from_pretrained` gives for `output_loading_info=True`.

    Raises:
        ConfigError: weights are missing.
    """
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{name} has not all its weights: {len(missing)} tensors are missing, such as "
            f"{missing[0]!r}"
        )
