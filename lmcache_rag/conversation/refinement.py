"""Refinement: the exact KV of what was answered over blended KV, computed while nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmcache_rag.blend.passes import Pass, PassRunner
from lmcache_rag.blend.workspace import Workspace
from lmcache_rag.plan.cost import Rates

_PIECE_TOKENS = 128
PIECE_S = 0.3
"""A request that arrives waits for a piece that is under way."""

_LEAST_TOKENS = 16


class Refiner:
    """Computes one prompt at a time, in pieces. Between pieces it holds no workspace: what is computed lies in main
    memory, and a blend may come in between.

    Args:
        rates: how fast tokens are computed.
    """

    def __init__(self, workspace: Workspace, run: PassRunner, rates: Rates) -> None:
        self._workspace = workspace
        self._run = run
        self._rates = rates
        self._token_ids: tuple[int, ...] = ()
        self._pieces: list[Tensor] = []

    def take_up(self, token_ids: Sequence[int]) -> int:
        """Go on with a prompt: what was done of another that begins alike is kept, the rest dropped. Returns how many
        of its first tokens are done."""
        token_ids, kept, end = tuple(token_ids), 0, 0
        if token_ids == self._token_ids:
            return sum(piece.shape[2] for piece in self._pieces)
        for piece in self._pieces:
            following = end + piece.shape[2]
            if token_ids[:following] != self._token_ids[:following]:
                break
            kept, end = kept + 1, following
        if kept < len(self._pieces):
            self._workspace.holder = None
        del self._pieces[kept:]
        self._token_ids = token_ids
        return end

    def advance(self) -> int:
        """Compute the next piece; returns how many of the prompt's first tokens are done."""
        start = self.place()
        in_time = int((PIECE_S - self._rates.pass_s) / self._rates.prefill_s(start, start + 1))
        piece = max(_LEAST_TOKENS, min(_PIECE_TOKENS, in_time))
        end = min(start + piece, len(self._token_ids))
        if start < end:
            positions = torch.arange(start, end, device=self._workspace.device)
            ids = torch.tensor(self._token_ids[start:end], dtype=torch.int64, device=self._workspace.device)
            self._run(ids, Pass(self._workspace, positions))
            self._keep(start, end)
        return end

    def give(self, tokens: int, put: Callable[[int], None]) -> int:
        """The next tokens' exact KV, where it is known; returns how many of the prompt's first tokens are done.

        Args:
            put: puts it in its place in the workspace, from a position on.
        """
        start = self.place()
        self._workspace.holder = None  # until all of it is there
        put(start)
        self._workspace.holder = self
        self._keep(start, start + tokens)
        return start + tokens

    def place(self) -> int:
        """Have all that is done in the workspace, from position 0 on; returns how many tokens that is."""
        start = 0
        for piece in self._pieces:
            end = start + piece.shape[2]
            if self._workspace.holder is not self:
                self._workspace.key[:, start:end], self._workspace.value[:, start:end] = piece
            start = end
        self._workspace.holder = self
        return start

    def taken(self, start: int, length: int) -> Tensor:
        """A position-free copy of what is done of some tokens: `[layers, 2, length, kv_heads, head_size]`."""
        self.place()
        return self._workspace.take(start, length)

    def forget(self) -> None:
        """Free the memory of what was done."""
        self._token_ids, self._pieces = (), []

    def _keep(self, start: int, end: int) -> None:
        rows = slice(start, end)
        self._pieces.append(torch.stack([self._workspace.key[:, rows], self._workspace.value[:, rows]]).cpu())
