"""What all tests share."""

import os

# before anything imports triton, which transformers does: its own library is decorated at import
if "TRITON_INTERPRET" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
