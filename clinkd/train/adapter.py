"""Low-rank adapters (peft): put in before training, merged into a plain model after it."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clinkd.config import AdapterConfig
from clinkd.errors import ConfigError, SetupError


def quantisation(config: AdapterConfig) -> dict[str, Any]:
    """What `from_pretrained` needs to load the frozen weights of `qlora`; else nothing.

    Raises:
        SetupError: bitsandbytes is not installed.
    """
    if config.kind != "qlora":
        return {}
    if find_spec("bitsandbytes") is None:
        raise SetupError("model.adapter.kind=qlora needs bitsandbytes: pip install clinkd[qlora]")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    return {"quantization_config": settings}


def add_adapter(model: PreTrainedModel, config: AdapterConfig, seed: int) -> PreTrainedModel:
    """The model with fresh adapters, its own weights frozen; as it is where `kind` is none.

    Raises:
        SetupError: peft is not installed.
        ConfigError: `targets` fits no module, or one that shares its weights with another, or the
            head.
    """
    if config.kind == "none":
        return model
    if find_spec("peft") is None:
        raise SetupError("model.adapter needs peft: pip install clinkd[lora]")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.kind == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
    )
    shared = _shared_modules(model)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # the same start on every rank and in every try
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"model.adapter.targets: {error}") from None
    finally:
        torch.random.set_rng_state(state)
    targeted = set(adapted.base_model.targeted_module_names)
    if wrong := sorted(shared & targeted):
        raise ConfigError(
            f"model.adapter.targets fits {wrong[0]}, but {' and '.join(sorted(shared))} share "
            "their weights: merged, the adapter of one would change the other as well"
        )
    if "lm_head" in targeted:
        raise ConfigError(
            "model.adapter.targets fits lm_head: the loss reads its weights, so that an adapter of "
            "it would not learn"
        )
    return adapted


def _shared_modules(model: PreTrainedModel) -> set[str]:
    """Names of the embeddings and the head where they are tied, else nothing."""
    weight = model.get_input_embeddings().weight
    names = {name for name, m in model.named_modules() if getattr(m, "weight", None) is weight}
    return names if len(names) > 1 else set()


def inner_model(model: Any) -> Any:
    """The Hugging Face model, whether adapters are around it or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trained_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The adapters' weights alone; None for a model without."""
    if not hasattr(model, "get_base_model"):
        return None
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merged(model: Any, start: str | Path) -> PreTrainedModel:
    """A plain model: adapters added to the weights; the trained one is not changed.

    Args:
        start: what the model was loaded from: weights in 4 bits are not merged but read again.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        from clinkd import models

        whole: Any = models.load(start, dtype=torch.bfloat16)
        models.apply(whole, models.positions_of(model.get_base_model().config))
        fresh = get_peft_model(whole, model.peft_config["default"])
        set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
        return fresh.merge_and_unload()
    return copy.deepcopy(model).merge_and_unload()
