"""Attention for crops of several resolutions packed in one buffer."""

from __future__ import annotations

from dino_fast.ops.packed_attention import packed_attention

__all__ = ["packed_attention"]
