"""Names of blocks in vLLM's prefix cache: approximate KV never answers a request for exact KV.

The hashes that name blocks chain, so it is enough to mix a digest into what the first block of approximate KV is
chained to. Blocks before it hold exact KV and keep the names under which all requests may share them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_rag.conversation.answers import Salt

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request


@dataclass(frozen=True)
class BlockNames:
    """How a request's blocks are named.

    Attributes:
        hashes: of the prompt's full blocks; those of the answer's blocks are chained to the last one.
        cache_salt: what the first block's hash is made with.
    """

    hashes: tuple[BlockHash, ...]
    cache_salt: str | None

    @classmethod
    def of(cls, request: Request) -> BlockNames:
        """Those that vLLM gave it: the names of exact KV, until `give`."""
        return cls(tuple(request.block_hashes), request.cache_salt)

    def salted(self, request: Request, salts: Sequence[Salt]) -> BlockNames:
        """Names of KV that blends have shaped, each behind the blocks of the one before."""
        names = self
        for salt in salts:
            names = names._salted(request, salt)
        return names

    def _salted(self, request: Request, salt: Salt) -> BlockNames:
        named, kept_blocks, digest = copy.copy(request), *salt
        named.block_hashes = list(self.hashes[:kept_blocks])
        named.cache_salt = self.cache_salt if kept_blocks else digest
        if kept_blocks:
            parent = named.block_hashes[-1]
            named.block_hashes[-1] = type(parent)(parent + bytes.fromhex(digest))
        named.update_block_hashes()
        return BlockNames((*self.hashes[:kept_blocks], *named.block_hashes[kept_blocks:]), named.cache_salt)

    def extended(self, request: Request) -> BlockNames:
        """Those of all full blocks, the answer's included."""
        named = copy.copy(request)
        named.block_hashes, named.cache_salt = list(self.hashes), self.cache_salt
        named.update_block_hashes()
        return BlockNames(tuple(named.block_hashes), self.cache_salt)

    def give(self, request: Request) -> None:
        """Have vLLM look the request's blocks up, and keep them, under these names."""
        request.block_hashes[:] = self.hashes
        request.cache_salt = self.cache_salt


def kept_blocks(tokens: int, names: BlockNames, block_tokens: int) -> int:
    """How many blocks keep their names where so many first tokens' KV is not a blend's own. The prompt's last full
    block is never one of them, since blocks that fill up later are chained to it."""
    return max(0, min(tokens // block_tokens, len(names.hashes) - 1))


class PrefixCache:
    """vLLM's prefix cache, asked by name: asking changes nothing.

    Args:
        block_tokens: tokens per block, and per hash.
    """

    def __init__(self, manager: KVCacheManager, block_tokens: int) -> None:
        self._manager = manager
        self._pool = manager.block_pool
        self._block_tokens = block_tokens

    def held(self, request: Request, names: BlockNames) -> int:
        """How many of the prompt's first tokens are there under these names."""
        return len(self.blocks(request, names)) * self._block_tokens

    def blocks(self, request: Request, names: BlockNames) -> list[int]:
        """The numbers of the blocks in which they are. The next step may read them; later they may hold others."""
        if not names.hashes:
            return []
        asked = copy.copy(request)
        asked.block_hashes = list(names.hashes)
        asked.kv_cache_report_mode = "incremental"  # else the lookup would be published as an event
        found, tokens = self._manager.get_computed_blocks(asked)[:2]
        return list(found.get_block_ids()[0][: tokens // self._block_tokens])

    def reserve(self, blocks: int) -> list[KVCacheBlock]:
        """So many blocks, of those that no request uses; none where there are hardly more, since among them are those
        that hold what is cached."""
        return self._pool.get_new_blocks(blocks) if 2 * blocks <= self._pool.get_num_free_blocks() else []

    def insert(self, request: Request, names: BlockNames, blocks: Sequence[KVCacheBlock], first: int) -> None:
        """Have reserved blocks, the request's from number `first` on, found under these names."""
        named = copy.copy(request)
        named.block_hashes, named.cache_salt = list(names.hashes), names.cache_salt
        self._pool.cache_full_blocks(
            request=named,
            blocks=[self._pool.null_block] * first + list(blocks),
            num_cached_blocks=first,
            num_full_blocks=first + len(blocks),
            block_size=self._block_tokens,
            kv_cache_group_id=0,
        )

    def release(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Reserved blocks may be used by others again, those with names last, from the end of the prompt on."""
        self._pool.free_blocks(list(reversed(blocks)))
