"""The keys of a run's YAML file, their meaning, limits and defaults."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from clinkd.train.correction.settings import CorrectorSettings

DEMO = "demo"  # the embedded model, or the small CLIP trained on the training split
SAMPLE = "sample"  # the records and images that come with the package

PositiveInt = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
HEAD_WIDTH = 32  # of the embedded model
Fraction = Annotated[float, Field(ge=0, le=1)]


def _at_home(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


def _in_heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(f"must be a multiple of {HEAD_WIDTH}, the width of a head")
    return width


def _said(given: Any) -> Any:
    """A heading with nothing under it says nothing, as where all its keys are comments."""
    return {} if given is None else given


Place = Annotated[str, AfterValidator(_at_home)]
Width = Annotated[int, Field(ge=HEAD_WIDTH), AfterValidator(_in_heads)]


class Section(BaseModel):
    """A frozen part of the configuration that knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        return _said(given)


class DataConfig(Section):
    train: Place = Field(SAMPLE, description="JSON-lines file of records, or 'sample'")
    test: Place = Field(SAMPLE, description="JSON-lines file of records, or 'sample'")
    root: Annotated[str | None, AfterValidator(_at_home)] = Field(
        None, description="folder of all images; default: that of `train`"
    )
    teacher_fraction: float = Field(
        0.111, gt=0, le=1, description="share of the training split that the teacher sees"
    )
    train_limit: PositiveInt | None = Field(None, description="at most so many training records")
    test_limit: PositiveInt | None = Field(None, description="at most so many test records")


class PositionsConfig(Section):
    preset: Literal["paper", "warm", "mrope", "gap2"] = Field(
        "warm", description="positions of image patches and text, see docs/rotary.md"
    )
    pos_scale: tuple[float, float] = Field(
        (2.0, 2.0), description="spacing of patches by height and width; the paper's alpha1, alpha2"
    )

    @field_validator("pos_scale")
    @classmethod
    def _scales_fit(cls, scales: tuple[float, float]) -> tuple[float, float]:
        if min(scales) <= 0:
            raise ValueError("must be two numbers above 0")
        return scales


class DemoModelConfig(Section):
    """Size of the embedded model; used only where `model.student` is 'demo'."""

    layers: PositiveInt = 4
    width: Width = Field(128, description="hidden size; a multiple of 32")
    vision_layers: PositiveInt = 3
    vision_width: Width = Field(96, description="a multiple of 32")
    vocabulary: int = Field(2000, ge=400, description="most tokens that the BPE may learn")


class AdapterConfig(Section):
    """Low-rank adapters instead of all weights (peft); needs clinkd[lora]."""

    kind: Literal["none", "lora", "qlora"] = Field(
        "none", description="qlora: the frozen weights in 4 bits; needs clinkd[qlora]"
    )
    rank: PositiveInt = 16
    alpha: PositiveInt = Field(32, description="the adapter's product counts alpha / rank")
    dropout: Fraction = 0.05
    targets: str = Field(
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        description="regular expression of the modules that get an adapter",
    )

    @field_validator("targets")
    @classmethod
    def _is_expression(cls, targets: str) -> str:
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"must be a regular expression: {error}") from None
        return targets


class ParallelConfig(Section):
    """Training over several processes of this machine (docs/training.md)."""

    processes: PositiveInt | Literal["auto"] = Field(
        "auto", description="training processes; auto: one a GPU"
    )
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp", description="what is cut over them: nothing, or by DeepSpeed optimiser states, "
        "gradients too, weights too",
    )  # fmt: skip
    offload: bool = Field(False, description="optimiser states in host memory (zero1 to zero3)")
    teacher: Literal["auto", "whole", "sharded", "offloaded"] = Field(
        "auto", description="weights of a teacher that is asked live: whole in every process, cut "
        "over them, or cut and in host memory; auto: cut with zero3, else whole",
    )  # fmt: skip
    dataloader_workers: NotNegative = Field(
        0, description="processes beside each training process that decode images ahead of it"
    )

    @property
    def teacher_place(self) -> str:
        """Where a live teacher's weights are: whole, sharded or offloaded."""
        if self.teacher != "auto":
            return self.teacher
        return "sharded" if self.strategy == "zero3" else "whole"

    @model_validator(mode="after")
    def _offload_fits(self) -> "ParallelConfig":
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload needs strategy zero1, zero2 or zero3")
        return self


class LogConfig(Section):
    """Beside metrics.jsonl and TensorBoard, which are always written."""

    wandb: str | None = Field(None, description="Weights & Biases project; needs its package")


class ModelConfig(Section):
    student: Place = Field(
        DEMO, description="hub name or folder of a Qwen-VL checkpoint, or 'demo'"
    )
    teacher: Annotated[str | None, AfterValidator(_at_home)] = Field(
        None, description="the same; default: the student's start"
    )
    positions: PositionsConfig = PositionsConfig()
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the arithmetic: in training on a GPU alone, whose weights stay float32, in "
        "answering anywhere",
    )
    freeze_vision: bool = Field(False, description="leave the vision tower as it is")
    adapter: AdapterConfig = AdapterConfig()
    min_pixels: PositiveInt = Field(56 * 56, description="smaller images are enlarged")
    max_pixels: PositiveInt = Field(768 * 768, description="larger images are shrunk")
    demo: DemoModelConfig = DemoModelConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must be at most max_pixels ({self.max_pixels})")
        if self.teacher == DEMO and self.student != DEMO:
            raise ValueError("teacher 'demo' needs student 'demo', by whose data it is built")
        return self


class TrainConfig(Section):
    epochs: float = Field(2, gt=0, description="passes over the stage's records")
    learning_rate: float = Field(2e-5, gt=0)
    batch_size: PositiveInt = Field(4, description="records a device and micro-batch")
    gradient_accumulation: PositiveInt = Field(1, description="micro-batches an optimiser step")
    warmup_ratio: Fraction = Field(0.03, description="share of the steps with a rising rate")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: PositiveInt = Field(2048, description="tokens; a longer record is an error")
    packing: bool = Field(
        False,
        description="records end to end in rows of at most max_length tokens, instead of similar "
        "ones side by side; batch_size counts such rows",
    )
    gradient_checkpointing: bool = False
    held_out: float = Field(
        0.0, ge=0, lt=0.5, description="share of the stage's groups kept back to watch the loss on"
    )
    save_steps: PositiveInt = Field(200, description="optimiser steps between checkpoints")
    log_steps: PositiveInt = Field(10, description="optimiser steps between log lines")


class DistillConfig(TrainConfig):
    kd_weight: float = Field(0.5, ge=0, description="a in (CE + a KD) / (1 + a); the paper's alpha")
    temperature: float = Field(1.0, gt=0, description="softmax temperature of both models")
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = "forward_kl"
    pseudo_labels: Literal["soft", "hard", "both"] = Field(
        "soft",
        description="learn the truth with the teacher's distributions (soft), the truth and the "
        "teacher's confident answers as more records (hard), or all of it (both)",
    )
    teacher_cache: Literal["none", "hidden", "top-k"] = Field(
        "none",
        description="ask the teacher once and keep its hidden states (exact) or top logits on disk",
    )
    teacher_top_k: int = Field(64, ge=16, le=256, multiple_of=4, description="logits kept a token")
    min_confidence: Fraction = Field(
        0.5, description="hard pseudo-labels below this mean token probability are left out"
    )


class CorrectConfig(TrainConfig):
    epochs: float = Field(1, gt=0, description="passes over the corrected records after each round")
    rounds: int = Field(2, ge=0, description="answer, correct, train: so many times; 0 = leave out")
    threshold: Fraction = Field(0.8, description="answers less similar to the truth are corrected")
    iou_threshold: Fraction = Field(0.5, description="VG answers below this IoU are corrected")
    policy: Literal["truth", "keep", "skip"] = Field(
        "truth",
        description="what to learn from where a correction fails its checks: the truth, what the "
        "round before made of the record (keep), or nothing (skip)",
    )
    records_limit: PositiveInt | None = Field(
        None, description="answer and correct at most so many training records a round"
    )
    similarity: str = Field(
        "minilm", description="'minilm', 'token_f1', or the name or folder of a sentence encoder"
    )
    corrector: Annotated[CorrectorSettings, BeforeValidator(_said)] = CorrectorSettings()


class GenerateConfig(Section):
    num_beams: int = Field(3, ge=1, le=16)
    num_samples: int = Field(3, ge=1, le=16, description="candidates kept of each question")
    max_new_tokens: PositiveInt = 80
    length_penalty: float = 1.0
    batch_size: PositiveInt = Field(8, description="questions at a time")
    selection: Literal["clip", "beam", "mixed", "consensus", "oracle"] = "clip"
    mix: Fraction = Field(
        0.5, description="lambda of 'mixed': weight of CLIP beside the beam score"
    )
    scorer: Place = Field(
        DEMO, description="open_clip name, 'local-dir:FOLDER', transformers CLIP folder, or 'demo'"
    )
    scorer_steps: PositiveInt = Field(300, description="training steps of the 'demo' scorer")

    @property
    def asks_scorer(self) -> bool:
        """Whether a CLIP model looks at the candidates."""
        return self.selection in ("clip", "mixed", "oracle")

    @model_validator(mode="after")
    def _samples_fit(self) -> "GenerateConfig":
        if self.num_samples > self.num_beams:
            raise ValueError(f"num_samples must be at most num_beams ({self.num_beams})")
        return self


class EvaluateConfig(Section):
    protocol: Literal["bird", "clinkd", "strict"] = "clinkd"
    meteor: Literal["auto", "jar", "python"] = Field(
        "auto", description="METEOR through its jar, or our approximation named meteor_py"
    )
    spice: bool = Field(
        False, description="RC by SPICE's jar (see `clinkd metrics fetch`), not scene-graph F1"
    )
    bootstrap: int = Field(1000, ge=0, description="resamples behind the 95 % intervals; 0: none")


class RunConfig(Section):
    """Teacher, pseudo-labels, distillation, correction, answers, metrics, report."""

    output: Place = Field("run", description="the run folder")
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    teacher: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    correct: CorrectConfig = CorrectConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _adapter_fits(self) -> "RunConfig":
        if self.parallel.strategy != "ddp" and self.model.adapter.kind != "none":
            raise ValueError(
                "model.adapter needs parallel.strategy ddp: its optimiser states are too few to cut"
            )
        return self
