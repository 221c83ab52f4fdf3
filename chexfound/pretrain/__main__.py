"""`python -m chexfound.pretrain STORE …`: `chexfound pretrain`, for torchrun's `-m`."""

from __future__ import annotations

import os
import sys
import time
import traceback

# As launch.py has it, for torchrun's ranks; before PyTorch is there to read it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from chexfound.commands.main import main  # noqa: E402
from chexfound.parallel.environment import (
    GRACE_S,
    end,
    to_come,  # noqa: E402
)

if __name__ == "__main__":
    try:
        code = main(["pretrain", *sys.argv[1:]])
    except Exception:
        if to_come() > 1:
            time.sleep(GRACE_S)  # another's death shows here as an error of the connection: let it be seen first
        traceback.print_exc()
        code = 1
    end(code)
