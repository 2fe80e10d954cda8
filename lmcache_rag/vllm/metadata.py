"""What the connector's two halves tell each other, once a step; nothing else is shared between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from lmcache_rag.library.room import Evicted
from lmcache_rag.plan.cost import Rates
from lmcache_rag.plan.plan import BlendPlan


@dataclass(frozen=True)
class BlendJob:
    """A blend that the worker half is to do, from this step on."""

    request_id: str
    plan: BlendPlan
    block_ids: tuple[int, ...]


Step = Literal["compute", "write", "store", "learn"]


@dataclass(frozen=True)
class Learning:
    """What of a prompt recurs and is to be stored.

    Attributes:
        namespace: in which it is looked for.
        learned: in which it is stored, where it is not there either.
        runs: start and length of each, ascending.
        preamble: so many of the prompt's first tokens are its preamble; what lies between it and a run primes the run.
    """

    namespace: str
    learned: str
    runs: tuple[tuple[int, int], ...]
    preamble: int


@dataclass(frozen=True)
class RefineJob:
    """A piece of a prompt's exact KV that the worker half is to make in a step without requests.

    Attributes:
        step: `compute` some more of it; `write` it to the paged cache from token `start` on; `store` some more of it as
            a conversation's; `learn`: store what recurs.
        held_ids: the blocks that hold exact KV of the first tokens already.
        block_ids: where to write it, from the block that holds `start`.
        chats: the namespace in which conversations are stored; empty where they are not.
        last: when this step is done nothing is left to do of this prompt.
    """

    token_ids: tuple[int, ...]
    step: Step
    held_ids: tuple[int, ...] = ()
    block_ids: tuple[int, ...] = ()
    start: int = 0
    chats: str = ""
    learning: Learning | None = None
    last: bool = False


@dataclass
class StepJobs(KVConnectorMetadata):
    """From the scheduler half to the worker half.

    Attributes:
        dropped: the requests that were aborted while they were blended.
        begun: the blend that begins in this step.
        tokens: how many tokens the blend under way may compute in this step; infinite where nobody else waits.
    """

    dropped: list[str] = field(default_factory=list)
    begun: BlendJob | None = None
    tokens: float = math.inf
    refine: RefineJob | None = None


@dataclass(frozen=True)
class Refined:
    """What came of a `RefineJob`.

    Attributes:
        done: nothing of this step is left to do.
        failure: the type of the exception that ended it; the prompt is given up.
        stored_bytes: written to the store.
        learned_tokens: of text that recurs, stored now.
        is_full: there was no room for some of it.
        evicted: deleted from it to make room.
    """

    done: bool = False
    failure: str = ""
    stored_bytes: int = 0
    learned_tokens: int = 0
    is_full: bool = False
    evicted: Evicted = field(default_factory=Evicted)


@dataclass
class StepReports(KVConnectorWorkerMetadata):
    """From the worker half back.

    Attributes:
        reports: request id -> `ReuseReport` as a dict, of blends that ended.
        placed: the requests whose chunk is computed and being stored: the next blend may begin.
        rates: how fast it computes and loads.
        refined: what it did meanwhile.
    """

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    placed: set[str] = field(default_factory=set)
    rates: Rates | None = None
    refined: Refined | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReports:
        assert isinstance(other, StepReports)
        refined = other.refined or self.refined
        rates = other.rates or self.rates
        return StepReports({**self.reports, **other.reports}, self.placed | other.placed, rates, refined)
