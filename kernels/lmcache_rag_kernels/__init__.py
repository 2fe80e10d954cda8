"""Tensor operations of lmcache-rag, one sub-package per operation."""

from lmcache_rag_kernels.attend import attend, attend_weighing
from lmcache_rag_kernels.restore import CodedGroups, Transform, restore
from lmcache_rag_kernels.rope import Rotation, rotate
from lmcache_rag_kernels.rows import Rows

__all__ = ["CodedGroups", "Rotation", "Rows", "Transform", "attend", "attend_weighing", "restore", "rotate"]
