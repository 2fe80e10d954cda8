"""Preambles that stay placed in memory: a prompt's first tokens attend to nothing else, so their KV is exact, and the
same in every prompt that begins with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lmcache_rag.again import SeenOnce
from lmcache_rag.blend.workspace import Workspace

_CAPACITY_BYTES = 256 << 20

_REMEMBERED = 256
"""Beginnings that were seen once."""


class Preambles:
    """K (RoPE applied) and V of what prompts began with, in main memory, those used last. What is kept for one owner is
    not placed for another.

    Args:
        capacity_bytes: of all that is kept; what is longer alone is not kept.
    """

    def __init__(self, capacity_bytes: int = _CAPACITY_BYTES) -> None:
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[tuple[Hashable, tuple[int, ...]], Tensor] = OrderedDict()
        self._bytes = 0
        self._seen_once = SeenOnce(_REMEMBERED)

    def place(self, workspace: Workspace, owner: Hashable, token_ids: Sequence[int]) -> bool:
        """Put K and V of these first tokens in their place; False where they are not kept."""
        kept = self._kept.get((owner, tuple(token_ids)))
        if kept is None:
            return False
        self._kept.move_to_end((owner, tuple(token_ids)))
        workspace.key[:, : len(token_ids)], workspace.value[:, : len(token_ids)] = kept
        return True

    def keep(
        self, workspace: Workspace, owner: Hashable, token_ids: Sequence[int], *, is_preamble: bool = True
    ) -> None:
        """Keep what the workspace holds of these first tokens; what was used longest ago makes room.

        Args:
            is_preamble: whether it is known to be one; else it may be one prompt's own beginning, and is kept when it
                comes again.
        """
        name, rows = (owner, tuple(token_ids)), slice(len(token_ids))
        size_bytes = workspace.key[:, rows].nbytes + workspace.value[:, rows].nbytes
        if not token_ids or name in self._kept or size_bytes > self._capacity_bytes:
            return
        if not is_preamble and not self._seen_once.again(hash(name)):
            return
        while self._bytes + size_bytes > self._capacity_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[name] = torch.stack([workspace.key[:, rows], workspace.value[:, rows]]).cpu()
        self._bytes += size_bytes
