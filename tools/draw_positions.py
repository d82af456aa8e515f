"""Draw docs/positions.png: where each preset puts the patches of an image and the text around it.

python tools/draw_positions.py
"""

from pathlib import Path

import matplotlib
import torch

from clinkd.rotary import gap_positions, mcg_positions, qwen_positions

matplotlib.use("Agg")
from matplotlib import pyplot

TARGET = Path(__file__).parent.parent / "docs" / "positions.png"
GRID = (4, 4)
BEFORE, AFTER = 4, 4


def main() -> None:
    tokens = [False] * BEFORE + [True] * (GRID[0] * GRID[1]) + [False] * AFTER
    image = torch.tensor([tokens])
    panels = {
        "paper and warm: MCG, pos_scale 2": mcg_positions(image, [[GRID]])[0],
        "MCG, pos_scale 1": mcg_positions(image, [[GRID]], pos_scale=(1.0, 1.0))[0],
        "mrope: as Qwen2-VL": qwen_positions(image, [[GRID]])[0][1:],
        "gap2: the authors' code": gap_positions(image, [[GRID]])[0][1:],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 3.9), sharex=True, sharey=True)
    for axis, (title, positions) in zip(axes, panels.items(), strict=True):
        height, width = positions[:, 0]
        for mask, color, marker, label in (
            (~image[0], "#c44e52", "o", "text"),
            (image[0], "#4c72b0", "s", "patches"),
        ):
            axis.scatter(
                width[mask], height[mask], c=color, marker=marker, s=26, label=label, zorder=2
            )
        axis.axline((0, 0), slope=1, color="0.8", lw=1, zorder=1)
        axis.set(title=title, xlabel="position by width", aspect="equal")
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("position by height")
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
