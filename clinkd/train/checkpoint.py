"""Models and checkpoints on the disk: whole or absent."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from clinkd.data.files import sync_folder, sync_tree
from clinkd.errors import SetupError
from clinkd.models.card import card
from clinkd.train.adapter import trained_state
from clinkd.train.loading import DIED
from clinkd.train.manifest import checkpoints, publish, seal
from clinkd.train.parallel import any_rank


def save_model(
    folder: Path, model: PreTrainedModel, processor: Any, state: dict[str, Tensor] | None = None
) -> None:
    """Write a Hugging Face model folder; `config.json`, which loading starts from, comes last.

    Args:
        state: the weights, where the model itself holds a part of them.

    Raises:
        SetupError: no space left, or no right to write.
    """
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging, state_dict=state)
        processor.save_pretrained(staging)
        (staging / "README.md").write_text(card(model.config), encoding="utf-8")
        files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        readable = (staging / "config.json").stat().st_mode
        for path in files:
            path.chmod(readable)  # safetensors gives its files to nobody else
        sync_tree(staging)
        for path in files:
            os.replace(path, folder / path.name)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise SetupError(f"{folder}: the model cannot be written: {_reason(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def whole_state(trainer: Trainer, model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of which each rank holds a part; all ranks must ask. Tied ones under one name."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    own = {name for name, _ in model.named_parameters()}
    own |= {name for name, _ in model.named_buffers()}
    # the ranks after the first get nothing
    return {name: tensor for name, tensor in (state or {}).items() if name in own}


class CheckpointTrainer(Trainer):
    """A Trainer whose checkpoints are whole or absent.

    They are written into a folder that no resumption looks at, sealed, then renamed. A rank that
    cannot write its part goes on to the end of the save, as the others wait for it there; then all
    ranks stop together.
    """

    def __init__(self, *args: Any, made_by: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made_by = made_by or {}  # what a resumption must be alike in
        self._staging: str | None = None
        self._problem: Exception | None = None  # the first of this rank in this save

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        self._staging, self._problem = str(root / ".staging"), None
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            with self._writing(OSError):
                super()._save_checkpoint(model, trial)
            if self._all_wrote(root / name) and self.args.should_save:
                with self._writing(OSError, SetupError):
                    seal(Path(self._staging) / name, self.made_by)
                    shutil.rmtree(root / name, ignore_errors=True)
                    publish(Path(self._staging) / name, root / name)
                    _prune(root, self.args.save_total_limit, self.state.best_global_step)
            self._all_wrote(root / name)
        finally:
            self._staging = None

    @contextmanager
    def _writing(self, *kinds: type[Exception]) -> Iterator[None]:
        """What goes wrong inside is kept for the vote."""
        try:
            yield
        except kinds as error:
            if str(error).startswith(DIED):  # torch says so wherever training is
                raise
            self._problem = self._problem or error

    def _all_wrote(self, folder: Path) -> bool:
        """True, or an error on every rank if one of them has a problem; all must ask."""
        if not any_rank(self._problem is not None):
            return True
        error = self._problem
        reason = "another process has the reason" if error is None else _reason(error)
        raise SetupError(
            f"{folder}: the checkpoint cannot be written ({reason}); "
            "free some space and start again, the one before it is whole"
        ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights of a checkpoint, under the model's own names.

        `save_pretrained` writes the hub's older names, which the Trainer's resumption does not
        know: it would go on from the weights that the run had started with, with a warning alone.
        """
        with self._writing(OSError, SafetensorError):
            if state_dict is not None:  # gathered by DeepSpeed, which restores files of its own
                super()._save(output_dir, state_dict)
                return
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            adapters = trained_state(self.model)
            if adapters is not None:
                save_file(adapters, str(folder / "adapter.safetensors"))
            else:
                save_weights(self.model, str(folder / "model.safetensors"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            with self._writing(OSError, RuntimeError):  # the latter is torch.save's full disk
                super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped.checkpoint_engine
        write: Callable[..., Any] = engine.save

        def save(*args: Any, **kwargs: Any) -> None:
            with self._writing(OSError, RuntimeError):
                write(*args, **kwargs)

        engine.save = save
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            engine.save = write

    def _save_rng_state(self, output_dir: str) -> None:
        with self._writing(OSError, RuntimeError):
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / "adapter.safetensors").exists():
            self.model.load_state_dict(load_file(folder / "adapter.safetensors"), strict=False)
        else:
            load_weights(self.model, str(folder / "model.safetensors"))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)


def _reason(error: Exception) -> object:
    return error.strerror if isinstance(error, OSError) else error


def _prune(root: Path, keep: int | None, best: int | None) -> None:
    """Keep the last checkpoints, and that of the best step where a held-out loss says which."""
    found = checkpoints(root)
    for step, path in list(found.items())[: -(keep or len(found))]:
        if step != best:
            shutil.rmtree(path, ignore_errors=True)
