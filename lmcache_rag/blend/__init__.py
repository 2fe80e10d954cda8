"""Blending: stored chunk KV is put together, and a few well-chosen tokens are recomputed. Pure torch, no vLLM."""

from lmcache_rag.blend.blender import Blender, PassRunner
from lmcache_rag.blend.selectors import SELECTORS, Selection, Selector
from lmcache_rag.blend.workspace import LayerSpec, Workspace

__all__ = [
    "SELECTORS",
    "Blender",
    "LayerSpec",
    "PassRunner",
    "Selection",
    "Selector",
    "Workspace",
]
