"""What a request is answered from: exact KV in vLLM's prefix cache, KV of an earlier answer, or stored chunks."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmcache_rag.codec import CODECS
from lmcache_rag.conversation.answers import Answered, Answers, Salt, Terms
from lmcache_rag.conversation.prefixes import begun_segments
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.names import chats_of, codec_of, learned_of
from lmcache_rag.plan.matching import History
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment
from lmcache_rag.plan.planner import Planner, plan_digest
from lmcache_rag.request import BlendOptions, ReuseReport
from lmcache_rag.vllm.isolation import BlockNames, PrefixCache, kept_blocks

if TYPE_CHECKING:
    from vllm.v1.request import Request

SMALL_REST = 64
"""So few tokens are computed by vLLM's own prefill, whatever is stored."""

_TRIED = 2
"""So many of the answers that a prompt begins like are looked for in the prefix cache: naming blocks takes time."""

_WAITING = 64
"""Of so many requests it is kept how their blocks would be named."""

_MOST_BLENDS = 8
"""Behind so many blends, each done behind the one before, another one begins anew."""


@dataclass(frozen=True)
class Held:
    """What vLLM's prefix cache holds of a prompt.

    Attributes:
        exact: so many first tokens' exact KV.
        continued: the answer whose blocks hold more, if any.
        tokens: so many first tokens' KV then, exact or approximate.
        names: of the blocks that hold them.
        salts: what these names are mixed with.
    """

    exact: int
    continued: Answered | None
    tokens: int
    names: BlockNames
    salts: tuple[Salt, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What a request is answered from, and how its blocks are named.

    Attributes:
        plan: the blend to do; None where vLLM computes what is not held.
        held: what the choice rests on.
        salts: what the names are mixed with; nothing where all are those of exact KV.
    """

    plan: BlendPlan | None
    held: Held
    names: BlockNames
    salts: tuple[Salt, ...] = ()

    @property
    def continued(self) -> Answered | None:
        """The earlier answer whose KV is kept, if any."""
        is_kept = self.plan is None or self.plan.held_tokens > self.held.exact
        return self.held.continued if self.salts and is_kept else None


_Begun = tuple[Answered, tuple[Salt, ...], BlockNames]


class Chooser:
    """Chooses what is fastest among all that is known here. Choosing changes nothing; of the store it asks what
    was recorded since.

    Args:
        prefixes: None where the engine has no prefix cache.
        never_slower: whether what is held is preferred where it is faster; else stored chunks always are.
        chats: stored conversations, where they are used.
        learns: whether text that recurs is stored, each caller's apart.
        learns_unsalted: whether also that of callers without a `cache_salt`, who count as one.
    """

    def __init__(
        self,
        planner: Planner,
        answers: Answers,
        block_tokens: int,
        *,
        never_slower: bool,
        chats: ChunkStores | None = None,
        learns: bool = False,
        learns_unsalted: bool = False,
    ) -> None:
        self.prefixes: PrefixCache | None = None
        self._planner = planner
        self._answers = answers
        self._block_tokens = block_tokens
        self._never_slower = never_slower
        self._chats = chats
        self._learns = learns
        self._learns_unsalted = learns_unsalted
        self._named: OrderedDict[str, tuple[Any, list[_Begun]]] = OrderedDict()

    def terms(self, options: BlendOptions, names: BlockNames) -> Terms:
        """On which a request's KV may be inherited; `names` are those that vLLM gave its blocks."""
        namespace = self._planner.namespace_of(options)
        return Terms(names.cache_salt, namespace, options.selector, options.ttft_goal_s is not None)

    def held(self, request: Request, names: BlockNames, options: BlendOptions) -> Held:
        """What there is of a prompt in the prefix cache now; `names` are those that vLLM gave its blocks."""
        prefixes = self.prefixes
        if prefixes is None or options.mode == "precompute":
            return Held(0, None, 0, names)
        exact = prefixes.held(request, names)
        if request.num_prompt_tokens - exact <= SMALL_REST:
            return Held(exact, None, exact, names)
        least = exact + SMALL_REST
        for answered, salts, salted in self._begun_like(request, names, options, least):
            tokens = prefixes.held(request, salted)
            if tokens > least:
                return Held(exact, answered, tokens, salted, salts)
        return Held(exact, None, exact, names)

    def _begun_like(self, request: Request, names: BlockNames, options: BlendOptions, least: int) -> list[_Begun]:
        """The answers that a prompt begins like, and how its blocks are named then. A request that waits is asked about
        in each step, so that is kept until there is another answer."""
        state = self._answers.added, least, names
        kept, found = self._named.get(request.request_id, (None, []))
        if kept != state:
            terms, ratio = self.terms(options, names), self._planner.ratio_of(options)
            assert request.prompt_token_ids is not None
            answers = self._answers.continued_by(request.prompt_token_ids, terms, ratio, least)[:_TRIED]
            salted = [
                (answered, tuple(salt for salt in answered.salts if salt.kept_blocks < len(names.hashes)))
                for answered in answers
            ]
            found = [(answered, salts, names.salted(request, salts)) for answered, salts in salted if salts]
            self._named[request.request_id] = state, found
            while len(self._named) > _WAITING:
                self._named.popitem(last=False)
        return found

    def choose(self, request: Request, names: BlockNames, options: BlendOptions, report: ReuseReport) -> Choice:
        """What is fastest; `report` says why."""
        held = self.held(request, names, options)
        history = self._history(request, names, options, held)
        prefix = self._stored_prefix(request, history, held)
        there = max(held.tokens, prefix.end if prefix is not None else 0) if self._never_slower else 0
        plan = None
        assert request.prompt_token_ids is not None
        if not there or request.num_prompt_tokens - there > SMALL_REST:
            learned = self.learned(options, names)
            plan = self._planner.plan(
                request.prompt_token_ids,
                options,
                report,
                held_tokens=there,
                behind=self._behind(request, held) if there else 0,
                history=history,
                learned=learned,
            )
        if plan is not None:
            return self._blended(request, names, held, replace(plan, cache_salt=names.cache_salt))
        if there:
            report.misses.clear()
            report.missed_tokens = 0
        if prefix is not None:
            return Choice(prefix, held, names)
        if held.continued is not None:
            return Choice(None, held, held.names, held.salts)
        return Choice(None, held, names)

    def _behind(self, request: Request, held: Held) -> int:
        """How many first tokens a blend may begin behind: those whose KV is in the prefix cache, in whole blocks, and
        exact or of an earlier answer that the prompt continues. A prompt that only begins with the same passages is
        blended anew: they were repaired for another question. One that asks something else of the last turn's begins
        behind the turn before."""
        tokens, answered = held.exact, held.continued
        assert request.prompt_token_ids is not None
        if self._planner.cost.held_s is None:
            return 0
        if answered is not None and len(held.salts) < _MOST_BLENDS:
            if answered.is_continued_by(request.prompt_token_ids):
                tokens = held.tokens
            elif len(held.salts) > 1:
                tokens = max(tokens, min(held.tokens, held.salts[-1].kept_blocks * self._block_tokens))
        return kept_blocks(tokens, held.names, self._block_tokens) * self._block_tokens

    def chats(self, options: BlendOptions, names: BlockNames) -> str:
        """The namespace of a request's conversation; empty where conversations are not stored."""
        namespace = self._planner.namespace_of(options)
        return "" if self._chats is None else chats_of(namespace, names.cache_salt)

    def learned(self, options: BlendOptions, names: BlockNames) -> str:
        """The namespace of what was learned from a caller's prompts; empty where nothing is."""
        learns = self._learns and (names.cache_salt is not None or self._learns_unsalted)
        return learned_of(self._planner.namespace_of(options), names.cache_salt) if learns else ""

    def _history(self, request: Request, names: BlockNames, options: BlendOptions, held: Held) -> History | None:
        """What is stored of the request's conversation; None where that cannot help."""
        if self._chats is None or options.mode == "precompute" or request.num_prompt_tokens - held.tokens <= SMALL_REST:
            return None
        chunks = self._chats.of(self.chats(options, names))
        try:
            chunks.follow()
        except StoreError:
            return None  # the planner's own store is the same, so the report will say so
        assert request.prompt_token_ids is not None
        return History(chunks, begun_segments(chunks, request.prompt_token_ids[: self._planner.max_tokens]))

    def _stored_prefix(self, request: Request, history: History | None, held: Held) -> BlendPlan | None:
        """A plan for the exact KV of the prompt's beginning that is stored, if loading it is worth its time."""
        if history is None:
            return None
        assert request.prompt_token_ids is not None
        return self._planner.exact(request.prompt_token_ids, history, held_tokens=held.tokens)

    def _blended(self, request: Request, names: BlockNames, held: Held, plan: BlendPlan) -> Choice:
        exact_tokens = exact_span(plan) if plan.mode == "blend" else 0
        if exact_tokens == plan.end:
            return Choice(plan, held, names)
        precomputed = plan.mode == "precompute"  # it is to find nothing, so that its whole KV is captured
        kept = kept_blocks(max(exact_tokens, plan.held_tokens), names, self._block_tokens)
        salt = Salt(kept, uuid.uuid4().hex if precomputed else plan_digest(plan))
        if plan.held_tokens > held.exact:
            before = tuple(earlier for earlier in held.salts if earlier.kept_blocks < kept)
            return Choice(plan, held, held.names.salted(request, [salt]), (*before, salt))
        return Choice(plan, held, names.salted(request, [salt]), (salt,))


def exact_span(plan: BlendPlan) -> int:
    """How many of the prompt's first tokens get KV that equals full prefill's: the preamble, and an exact chunk that
    follows it, where they were stored lossless."""
    end = 0
    for segment in (plan.preamble, *plan.begun, *plan.segments):
        if not segment.exact or not _is_lossless(segment) or segment.start != end:
            break
        end = segment.end
    return end


def _is_lossless(segment: PlannedSegment) -> bool:
    """Whether a segment's KV will be what was computed, whichever of its forms is loaded."""
    names = [segment.name, *(form.name for form in segment.forms)]
    return all(name is None or CODECS[codec_of(name)].lossless for name in names)
