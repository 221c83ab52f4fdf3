"""Ranks train the small models of pretraining's own tests."""

from __future__ import annotations

from tests.pretrain.conftest import _one_thread, small

__all__ = ["_one_thread", "small"]
