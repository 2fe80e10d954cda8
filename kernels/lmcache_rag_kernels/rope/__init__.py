"""Rotary position embedding (RoPE): put on and taken off keys at any positions."""

from lmcache_rag_kernels.rope.reference import Rotation, rotate

__all__ = ["Rotation", "rotate"]
