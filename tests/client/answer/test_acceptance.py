"""What a site keeps of the weights that it accepted: one round, of one run."""

from __future__ import annotations

from pathlib import Path

import torch

from client.answer.acceptance import Accepted, Shelf


def accepted(number: int) -> Accepted:
    return Accepted(phase="pretrain", round=number, step=number, sent={"student": "ab" * 32})


def names(shelf: Shelf) -> list[str]:
    return sorted(path.name for path in shelf.folder.glob("*"))


def test_where_a_run_begins_nothing_of_others_is_kept_and_where_it_goes_on_all_is(tmp_path: Path) -> None:
    one, other = Shelf(tmp_path, "one"), Shelf(tmp_path, "other")
    one.put(accepted(0), {"student.w": torch.zeros(2)}, begins=True)
    other.put(accepted(3), {"student.w": torch.ones(2)}, begins=False)
    assert names(one) == ["accepted.json", "pretrain-000000.safetensors"]
    one.put(accepted(1), {"student.w": torch.ones(2)}, begins=True)
    assert names(one) == ["accepted.json", "pretrain-000001.safetensors"]
    assert not other.folder.exists()
    assert Shelf(tmp_path, "one").accepted == accepted(1)
