"""The README of a model folder: what a person sees first who is given it."""

from typing import Any

from clinkd.models.apply import positions_of

HEAD = """\
---
library_name: clinkd
pipeline_tag: image-text-to-text
---

# {kind}, positions `{preset}`

```python
from clinkd import models

model = models.load("this folder")
```

"""
OURS = """\
**Other loaders give other answers, and do not say so.** `config.json` names the positions that
this model was trained with (`clinkd_positions`); transformers' own classes, vLLM, llama.cpp and
others do not know them and run the checkpoint's M-RoPE instead.
"""
STOCK = """\
The positions are the checkpoint's own M-RoPE: transformers' classes and what else reads Hugging
Face folders load this model as well.
"""


def card(config: Any) -> str:
    """Text for a model's configuration: how it is loaded, and by whom it is misread."""
    found = positions_of(config)
    preset = "mrope" if found is None else found.preset
    kind = (config.architectures or [config.model_type])[0]
    return HEAD.format(kind=kind, preset=preset) + (STOCK if preset == "mrope" else OURS)
