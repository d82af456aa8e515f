"""Write tests/golden/rotary.json: positions and rotary factors as transformers computes them.

    python tools/make_golden_rotary.py

The tests compare with the file, so a change in transformers and a change here are told apart.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.vision_utils import get_vision_position_ids

TARGET = Path(__file__).parent.parent / "tests" / "golden" / "rotary.json"
IMAGE, START, END, PAD = 10, 12, 13, 0
ROWS = [
    [5, 6, START] + [IMAGE] * 6 + [END, 7, 8, 9],
    [5, START] + [IMAGE] * 9 + [END, 4, START] + [IMAGE] * 2 + [END, 30, 31, 32, 33],
    [START] + [IMAGE] * 20 + [END],
    [40, 41, 42],
]
GRIDS = [[1, 4, 6], [1, 6, 6], [1, 2, 4], [1, 8, 10]]  # patches; merged 2 x 2
PLACES = [[0, 0, 0], [7, 7, 7], [9, 10, 12], [100, 131, 104], [4095, 4095, 4095]]  # t, h, w
VISION_GRID = [[1, 4, 6]]


def index(model_class: Any, config: Any) -> dict[str, Any]:
    """`get_rope_index` of rows padded on the left and on the right."""
    with torch.device("meta"):
        model = model_class(config)
    length = max(len(row) for row in ROWS)
    found = {}
    for side in ("left", "right"):
        ids = torch.full((len(ROWS), length), PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(ROWS):
            place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        positions, deltas = model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            image_grid_thw=torch.tensor(GRIDS),
            attention_mask=mask,
        )
        found[side] = {
            "attention_mask": mask.tolist(),
            "image_mask": (ids == IMAGE).int().tolist(),
            "positions": positions.tolist(),
            "deltas": deltas.flatten().tolist(),
        }
    return found


def factors(module: Any, position_ids: torch.Tensor) -> dict[str, Any]:
    """First halves of the cosines and sines, which the second halves repeat."""
    cos, sin = module(torch.zeros(1, 1, 1), position_ids)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return {
        name: [[round(v, 8) for v in row] for row in t[..., :half].reshape(-1, half).tolist()]
        for name, t in (("cos", cos), ("sin", sin))
    }


def text_config(sections: list[int], theta: float, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    small = {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    return {"num_hidden_layers": 1, "vocab_size": 60, "rope_parameters": rope, **small, **more}


def main() -> None:
    special = {"image_token_id": IMAGE, "video_token_id": 11, "vision_start_token_id": START}
    two = Qwen2VLConfig(
        text_config=text_config([16, 24, 24], 1e6),
        vision_config={"depth": 1, "embed_dim": 80, "num_heads": 1, "hidden_size": 128},
        **special,
    )
    two_five = Qwen2_5_VLConfig(
        text_config=text_config([16, 24, 24], 1e6),
        vision_config={"depth": 1, "hidden_size": 80, "num_heads": 1, "out_hidden_size": 128},
        **special,
    )
    three = Qwen3VLConfig(
        text_config=text_config([24, 20, 20], 5e6, head_dim=128),
        vision_config={"depth": 1, "hidden_size": 80, "num_heads": 1, "out_hidden_size": 128},
        **special,
    )
    places = torch.tensor(PLACES).T[:, None]  # [3, 1, tokens]
    patches = get_vision_position_ids(torch.tensor(VISION_GRID), 2)
    golden = {
        "transformers": transformers.__version__,
        "grids": [[h // 2, w // 2] for _, h, w in GRIDS],
        "places": PLACES,
        "patches": patches.tolist(),
        "index": {
            "qwen2_vl": index(modeling_qwen2_vl.Qwen2VLModel, two),
            "qwen2_5_vl": index(modeling_qwen2_5_vl.Qwen2_5_VLModel, two_five),
            "qwen3_vl": index(modeling_qwen3_vl.Qwen3VLModel, three),
        },
        "text": {
            "qwen2_vl": factors(
                modeling_qwen2_vl.Qwen2VLRotaryEmbedding(two.text_config), places.clone()
            ),
            "qwen2_5_vl": factors(
                modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(two_five.text_config), places.clone()
            ),
            "qwen3_vl": factors(
                modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(three.text_config), places.clone()
            ),
        },
        "vision": factors(
            modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding(two.vision_config), patches
        ),
    }
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(golden) + "\n")
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
