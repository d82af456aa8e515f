"""One run, described by one YAML file: these keys and no others.

`load` reads the file, applies `key=value` overrides, and checks everything before any work starts.
"""

from clinkd.config.reading import check, dump, load
from clinkd.config.sections import (
    DEMO,
    SAMPLE,
    AdapterConfig,
    CorrectConfig,
    DataConfig,
    DemoModelConfig,
    DistillConfig,
    GenerateConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "DEMO",
    "SAMPLE",
    "AdapterConfig",
    "CorrectConfig",
    "DataConfig",
    "DemoModelConfig",
    "DistillConfig",
    "GenerateConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "check",
    "dump",
    "load",
]
