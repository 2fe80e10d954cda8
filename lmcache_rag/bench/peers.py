"""Other ways of reading a text once, side by side: the same model, prompts and threads.

Each is asked a first question over some passages, another one over the same, and a third over the same in another
order. Fidelity is that of the first generated token, against the peer's own full prefill.
"""

from __future__ import annotations

import random
import statistics
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lmcache_rag.bench.scores import kl_divergence, log_probs
from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import completion_format
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]

WORKLOADS = ("first", "same", "permuted")
STRATEGIES = ("selective", "cacheblend")
"""Of kvboost."""

_OFF = BlendOptions(mode="off")
_FIRST_TOKEN = Sampling(max_tokens=1)
_DISTRIBUTION = Sampling(max_tokens=1, logprobs=-1)
_KVBOOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Asked:
    """What came of a prompt.

    Attributes:
        log_probs: of the first token, `[vocabulary]`.
        full: the same by the peer's full prefill.
        reused_share: of the prompt's tokens, those that were not computed, as the peer says.
    """

    ttft_s: float
    log_probs: np.ndarray
    full: np.ndarray
    reused_share: float


class Peer(Protocol):
    """One of them.

    Attributes:
        kv_bytes: of a token's KV where it is kept.
    """

    name: str
    kv_bytes: float

    def forget(self) -> None:
        """Know no prompt any more; what was precomputed may stay."""

    def ask(self, prompt: str) -> Asked: ...


class PrefixCache:
    """Plain vLLM."""

    name = "vLLM, prefix cache"
    _options = _OFF

    def __init__(self, engine: LocalEngine, kv_bytes: float) -> None:
        self._engine = engine
        self._salt = ""
        self.kv_bytes = kv_bytes

    def forget(self) -> None:
        self._salt = uuid.uuid4().hex

    def ask(self, prompt: str) -> Asked:
        done = self._engine.generate(prompt, _FIRST_TOKEN, self._options, cache_salt=self._salt)
        again = self._engine.generate(prompt, _DISTRIBUTION, self._options, cache_salt=self._salt)
        full = self._engine.generate(prompt, _DISTRIBUTION, _OFF, cache_salt=uuid.uuid4().hex)
        found, expected = (log_probs(each.logprobs)[0] for each in (again, full))
        known = done.reuse.local_tokens + done.reuse.reused_tokens
        return Asked(done.ttft_s, found, expected, known / done.prompt_tokens)


class Blending(PrefixCache):
    """lmcache-rag at its default target."""

    name = "lmcache-rag"
    _options = BlendOptions()


class KVBoost:
    """kvboost's chunk cache on Hugging Face transformers, in float32, with its settings as they are.

    Raises:
        EngineError: it is not installed.
    """

    def __init__(self, engine: LocalEngine, strategy: str, kv_bytes: float) -> None:
        try:
            from kvboost import GenerationMode, RecomputeStrategy
            from kvboost import KVBoost as Cache
        except ImportError as error:
            raise EngineError(f"kvboost is missing: install the extra `peers` ({error}).") from error
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(engine.threads)
        folder = engine.model_folder
        self.name, self.kv_bytes, self._modes = f"kvboost, {strategy}", kv_bytes, GenerationMode
        self._cache = Cache(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            max_cache_bytes=_KVBOOST_BYTES,
            recompute_strategy=RecomputeStrategy(strategy),
            device="cpu",
        )

    def forget(self) -> None:
        self._cache.reset_cache()

    def ask(self, prompt: str) -> Asked:
        done = self._cache.generate(prompt, max_new_tokens=1)
        full = self._cache.generate(prompt, max_new_tokens=1, mode=self._modes.BASELINE)
        found, expected = (_log_softmax(each.first_token_logits) for each in (done, full))
        return Asked(done.ttft_ms / 1000, found, expected, done.kv_reuse_ratio)


def bench_peers(
    engine: LocalEngine,
    peers: Sequence[Peer],
    *,
    passages: int,
    passage_tokens: int,
    questions: int,
    progress: Callable[[str], Any],
) -> list[Row]:
    """A row for each peer and workload."""
    form, tokenizer = completion_format(), engine.tokenizer
    preamble = form.preamble_ids(tokenizer)
    runs = token_runs(tokenizer, passages * questions, passage_tokens)
    texts = [form.chunk.replace("{text}", tokenizer.decode(run).strip()) for run in runs]  # type: ignore[attr-defined]
    progress("ingest")
    engine.precompute(preamble, [tokenizer.encode(text, add_special_tokens=False) for text in texts]).check()
    draw = random.Random(0)  # noqa: S311
    measured: dict[tuple[str, str], list[Asked]] = {(peer.name, work): [] for peer in peers for work in WORKLOADS}
    for number in range(questions):
        own = texts[number * passages :][:passages]
        moved = draw.sample(own, len(own))
        for peer in peers:
            progress(f"question {number + 1} of {questions}: {peer.name}")
            peer.forget()
            for work, given in (("first", own), ("same", own), ("permuted", moved)):
                question = form.question.replace("{question}", f"What do these passages say of {work} things?")
                prompt = "".join((form.preamble, *given, question))
                measured[peer.name, work].append(peer.ask(prompt))
    plain = statistics.median(each.ttft_s for each in measured[peers[0].name, "first"])
    return [_row(peer, work, measured[peer.name, work], plain) for peer in peers for work in WORKLOADS]


def _row(peer: Peer, workload: str, asked: Sequence[Asked], plain_s: float) -> Row:
    ttft_s = statistics.median(each.ttft_s for each in asked)
    divergences = [float(kl_divergence(each.full[None], each.log_probs[None])[0]) for each in asked]
    return {
        "peer": peer.name,
        "workload": workload,
        "ttft_median_s": round(ttft_s, 4),
        "speedup": round(plain_s / ttft_s, 2),
        "kl_first_token": round(statistics.mean(divergences), 4),
        "reused_share": round(statistics.mean(each.reused_share for each in asked), 3),
        "kv_bytes_per_token": round(peer.kv_bytes),
        "n": len(asked),
    }


def _log_softmax(logits: Any) -> np.ndarray:
    values = np.asarray(logits, dtype=np.float64).reshape(-1)
    return values - np.logaddexp.reduce(values)
