"""Tensor operations of lmcache-rag, one sub-package per operation."""

from lmcache_rag_kernels.attend import attend, attend_weighing
from lmcache_rag_kernels.restore import Transform, restore
from lmcache_rag_kernels.rope import Rotation, rotate

__all__ = ["Rotation", "Transform", "attend", "attend_weighing", "restore", "rotate"]
