"""Models cut over the processes by DeepSpeed's ZeRO-3: whole are only the layers at work."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from clinkd.train.parallel import strategy_file


def _settings(dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that does not learn."""
    whole = json.loads(strategy_file("zero3").read_text(encoding="utf-8"))
    zero = whole["zero_optimization"]
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "train_micro_batch_size_per_gpu": 1,
    }


@contextmanager
def cut_while_loading(dtype: torch.dtype, offload: bool) -> Iterator[None]:
    """While open, `from_pretrained` cuts parameters as they are made; the first rank reads them."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(_settings(dtype, offload))  # transformers knows it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def is_cut(model: Any) -> bool:
    """Whether a process holds a share of the model's parameters alone."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def engine_of(model: PreTrainedModel) -> Any:
    """DeepSpeed's engine around a frozen model that was loaded in `cut_while_loading`.

    Its calls gather each layer's parameters before the layer and let go of them behind it, so all
    processes must call it as often.
    """
    import deepspeed

    first = next(model.parameters())
    offload = first.ds_tensor.device.type == "cpu" and torch.cuda.is_available()
    engine, *_ = deepspeed.initialize(model=model, config=_settings(first.dtype, offload))
    return engine
