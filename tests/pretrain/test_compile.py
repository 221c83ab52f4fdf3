"""`train.compile` takes the same steps, under the same names.  With ranks: test_ranks.py."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from chexfound.pretrain.train import Pretrainer

pytestmark = [
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None,
        reason="no C++ compiler, which torch.compile needs on a processor",
    ),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # PyTorch's own, as it traces
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_step_is_the_plain_one(small, images, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    states, rows = [], []
    for wanted in (False, True):
        recipe = small(
            train__compile=wanted,
            train__checkpointing=checkpointing,
            student__drop_path_rate=0.3,
            optim__optimizer="sgd",
            optim__lr=0.05,
            optim__warmup_epochs=0,
        )
        assert counters["stats"]["unique_graphs"] == 0
        one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
        rows.append(one.run(0, 3, 4))
        states.append(one.state())
    assert counters["stats"]["unique_graphs"] >= 3  # teacher, student on global and on local crops
    assert not counters["graph_break"]
    for plain, compiled in zip(*rows, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
    assert states[0].keys() == states[1].keys()  # no `_orig_mod.` in any
    for name, tensor in states[0].items():
        assert torch.allclose(states[1][name], tensor, rtol=1e-4, atol=1e-6), name
