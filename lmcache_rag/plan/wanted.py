"""Which chunks prompts would rather have behind another preamble: the variants that are worth computing."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from lmcache_rag.chunk_kv import context_digest
from lmcache_rag.library.names import parsed
from lmcache_rag.plan.plan import BlendPlan

_REMEMBERED_PREAMBLES = 256
_REMEMBERED_CHUNKS = 1024
"""So many per preamble; of both, what was asked for longest ago is forgotten."""

_OFTEN = 2
"""A preamble that begins so many prompts is no accident, as one with a question in it is."""


@dataclass
class _Behind:
    """What was asked for behind one preamble: in how many prompts, and how often each chunk (by its key)."""

    prompts: int = 0
    chunks: OrderedDict[bytes, int] = field(default_factory=OrderedDict)

    def note(self, key: bytes) -> None:
        self.chunks[key] = self.chunks.pop(key, 0) + 1
        if len(self.chunks) > _REMEMBERED_CHUNKS:
            self.chunks.popitem(last=False)


class WantedVariants:
    """Counts the foreign chunks of plans by the preamble that they stand behind. In memory only; namespaces share
    nothing but the room."""

    def __init__(self, preambles: int = _REMEMBERED_PREAMBLES) -> None:
        self._most = preambles
        self._behind: OrderedDict[tuple[str, str], _Behind] = OrderedDict()

    def note(self, plan: BlendPlan) -> tuple[tuple[int, int], ...]:
        """Remember a plan, and say which of its chunks are to be computed behind its preamble: start and length of each
        in the prompt, where that preamble begins other prompts too."""
        foreign = {
            (segment.start, segment.length): parsed(segment.name)[0]
            for segment in plan.segments
            if segment.foreign and segment.name is not None and not segment.partial
        }
        if not foreign:
            return ()
        behind = self._of(plan)
        behind.prompts += 1
        for key in foreign.values():
            behind.note(key)
        return tuple(foreign) if behind.prompts >= _OFTEN else ()

    def asked(self, plan: BlendPlan, key: bytes) -> int:
        """How often a chunk was asked for behind the preamble of a plan."""
        behind = self._behind.get(_name(plan))
        return 0 if behind is None else behind.chunks.get(key, 0)

    def _of(self, plan: BlendPlan) -> _Behind:
        name = _name(plan)
        behind = self._behind.setdefault(name, _Behind())
        self._behind.move_to_end(name)
        if len(self._behind) > self._most:
            self._behind.popitem(last=False)
        return behind


def _name(plan: BlendPlan) -> tuple[str, str]:
    return plan.namespace, context_digest(plan.token_ids[: plan.preamble.length])
