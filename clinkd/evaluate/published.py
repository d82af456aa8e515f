"""Figures of the paper (arXiv 2502.05928): as printed, and as its own cells make them.

Only figures that we could read are here; a dash in a table is a figure that we could not. For
BiomedGPT and MedCoT there is none: they enter a comparison as prediction files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from clinkd.data.records import TASKS


@dataclass(frozen=True)
class Published:
    """A row of Table 1.

    Attributes:
        scores: task → percent, those known.
        average: as printed or recomputed; None: the mean of the four scores.
    """

    label: str
    scores: Mapping[str, float]
    average: float | None = None

    @property
    def mean(self) -> float | None:
        """The average; None where it is not known."""
        if self.average is not None:
            return self.average
        known = [self.scores[task] for task in TASKS if task in self.scores]
        return round(sum(known) / len(known), 2) if len(known) == len(TASKS) else None


# recomputed: the means of Table 4's cells by modality, and the mean of a row's four tasks
TABLE_1 = (
    Published("LLaVA-Med (paper)", {"VG": 0.0, "ROC": 2.75, "RC": 8.18, "MIA": 11.20}),
    Published("BiRD (paper, as printed)", {"ROC": 65.33}, 56.66),
    Published("Qwen2-VL, fine-tuned (paper, as printed)", {}, 61.37),
    Published("Qwen2-VL, fine-tuned (paper, recomputed)", {}, 60.845),
    Published(
        "ClinKD (paper, as printed)",
        {"VG": 67.51, "ROC": 82.35, "RC": 70.56, "MIA": 65.69},
        71.53,
    ),
    Published(
        "ClinKD (paper, recomputed)",
        {"VG": 67.65, "ROC": 82.35, "RC": 70.56, "MIA": 65.30},
        71.46,
    ),
)
# Table 2, on the average; of the rows between only the gain of SASG could be read
TABLE_2 = (
    ("BiRD (paper)", 56.66),
    ("BiRD + SASG (derived: 56.66 and the gain of 0.67)", 57.33),
    ("ClinKD, all (paper, as printed)", 71.53),
    ("ClinKD, all (paper, recomputed)", 71.46),
)
