"""What one blend is to do: which stored objects lie where in the prompt, and how they are repaired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmcache_rag.chunk_kv import StoredForm
from lmcache_rag.prompt import Segment


@dataclass(frozen=True)
class PlannedSegment(Segment):
    """A place in the prompt whose tokens are tokens `offset` on of the stored object `name`.

    Attributes:
        name: None where the chunk is to be computed, for `reason`.
        exact: the stored KV equals what full prefill would compute here.
        foreign: it was computed behind another preamble than the prompt's.
        size_bytes: of the object.
        tier: where it is read from, as far as that is known; see `blobs.tiers`.
        partial: much of the stored chunk lies outside these tokens.
        forms: where the answer has to begin in time: all forms of the object, by falling fidelity, to choose from.
    """

    offset: int = 0
    name: str | None = None
    exact: bool = False
    foreign: bool = False
    reason: str = "absent"
    size_bytes: int = 0
    partial: bool = False
    forms: tuple[StoredForm, ...] = ()
    tier: str = field(default="", compare=False, repr=False)

    @property
    def part(self) -> range | None:
        """Which of the chunk's tokens to read; None for all."""
        return range(self.offset, self.offset + self.length) if self.partial else None


@dataclass(frozen=True)
class BlendPlan:
    """One prompt's blend. K and V of positions 0 to `end` result; vLLM computes the rest.

    Attributes:
        mode: `prefix` where all segments are exact KV of the prompt's beginning, `precompute` where the segment is to
            be stored.
        token_ids: the whole prompt, the part behind `end` included.
        preamble: the prompt's tokens before the first segment, as a segment at 0, which may be empty; of a precompute
            plan its last `primer_tokens` are the primer.
        begun: stored exact KV of the prompt's beginning, from position 0 on without gaps; then there is no preamble.
        held_tokens: so many first tokens' KV, in whole blocks, is in the paged cache, and is what the blend begins
            behind; then there is neither preamble nor `begun`.
        segments: ascending, not overlapping, none behind `end`.
        ttft_goal_s: see `BlendOptions`.
        cache_salt: the request's; text of its own is kept for that one only.
        local_tokens: that many first tokens, those included, are in the paged cache already and are not written.
    """

    mode: Literal["blend", "prefix", "precompute"]
    namespace: str
    token_ids: tuple[int, ...]
    preamble: PlannedSegment
    segments: tuple[PlannedSegment, ...]
    end: int
    selector: str
    ratio: float
    ttft_goal_s: float | None = None
    cache_salt: str | None = None
    begun: tuple[PlannedSegment, ...] = ()
    held_tokens: int = 0
    local_tokens: int = 0
    primer_tokens: int = 0

    @property
    def preamble_of(self) -> tuple[str, str | None]:
        """Whose prompts the preamble is shared by: those of the namespace where it is stored there, or is to be, else
        those of the namespace with this cache salt."""
        return self.namespace, None if self.shares_preamble else self.cache_salt

    @property
    def shares_preamble(self) -> bool:
        """Whether the preamble is stored, or is to be."""
        return self.preamble.name is not None or self.mode == "precompute"

    @property
    def known(self) -> list[PlannedSegment]:
        """What there is an object of, in the prompt's order."""
        return [segment for segment in (self.preamble, *self.begun, *self.segments) if segment.name is not None]

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """What is to be read, but for the preamble, which stays in memory."""
        sizes: dict[str, int] = {}
        for segment in self.known:
            if segment is not self.preamble:
                sizes[segment.tier] = sizes.get(segment.tier, 0) + segment.size_bytes
        return sizes
