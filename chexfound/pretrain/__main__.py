"""`python -m chexfound.pretrain STORE …`: `chexfound pretrain`, for torchrun's `-m`."""

from __future__ import annotations

import os
import sys

# Before PyTorch is there to read it: DDP warns of an option that it is given on purpose (ranks.py).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from chexfound.cli import main  # noqa: E402
from chexfound.pretrain.environment import end  # noqa: E402

if __name__ == "__main__":
    end(main(["pretrain", *sys.argv[1:]]))
