"""Tensor operations of lmcache-rag, one sub-package per operation."""

from lmcache_rag_kernels.attend import attend, attend_weighing
from lmcache_rag_kernels.carry import Lesson, carrier
from lmcache_rag_kernels.restore import CodedGroups, Transform, restore
from lmcache_rag_kernels.rope import Rotation, rotate
from lmcache_rag_kernels.rows import Rows

__all__ = [
    "CodedGroups",
    "Lesson",
    "Rotation",
    "Rows",
    "Transform",
    "attend",
    "attend_weighing",
    "carrier",
    "restore",
    "rotate",
]
