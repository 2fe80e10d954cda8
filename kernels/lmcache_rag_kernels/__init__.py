"""Tensor operations of lmcache-rag, one sub-package per operation."""

from lmcache_rag_kernels.attend import attend, attend_weighing
from lmcache_rag_kernels.restore import CodedGroups, Transform, restore
from lmcache_rag_kernels.rope import Rotation, rotate

__all__ = ["CodedGroups", "Rotation", "Transform", "attend", "attend_weighing", "restore", "rotate"]
