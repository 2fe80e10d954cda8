"""Tensor operations of lmcache-rag, one sub-package per operation."""

from lmcache_rag_kernels.attend import attend, attention_mass
from lmcache_rag_kernels.rope import Rotation, rotate

__all__ = ["Rotation", "attend", "attention_mass", "rotate"]
