"""TTFT over a corpus whose KV is many times the engine's KV memory: questions over chunks drawn at random from all of
it, with the KV in each kind of store.

Full prefill is asked each question once, and the blend of each store once. Both are asked under fresh salts, so that
neither finds what was computed before.
"""

from __future__ import annotations

import json
import random
import statistics
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import EngineSettings, Sampling
from lmcache_rag.errors import CorpusError, EngineError
from lmcache_rag.prompt import MarkedPrompt, PromptFormat, Tokenizer
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]

_OFF = BlendOptions(mode="off")
_ONE_TOKEN = Sampling(max_tokens=1)
_QUESTION = "What do these passages have in common?"
_HOT_ASKED = 2
"""After so many times a question's chunks are in memory."""

_HOT_BYTES = 8 << 30
_SPARE_TOKENS = 64
_SPARE_BLOCKS = 4


def read_chunks(tokenizer: Tokenizer, path: Path, limit: int, chunk_tokens: int) -> list[list[int]]:
    """Passages joined into chunks of so many tokens.

    Args:
        path: a JSON object with `text`, and perhaps `title`, a line.

    Raises:
        CorpusError: the file cannot be read, or has too little text.
    """
    chunks: list[list[int]] = []
    tokens: list[int] = []
    try:
        with path.open() as file:
            for line in file:
                passage = json.loads(line)
                text = "\n".join(str(passage[key]) for key in ("title", "text") if key in passage)
                tokens += tokenizer.encode(f"{text}\n", add_special_tokens=False)
                while len(tokens) >= chunk_tokens and len(chunks) < limit:
                    chunks.append(tokens[:chunk_tokens])
                    tokens = tokens[chunk_tokens:]
                if len(chunks) == limit:
                    return chunks
    except (OSError, ValueError, TypeError) as error:
        raise CorpusError(f"--data: {path} is no file of JSON objects with a `text`, one a line ({error}).") from error
    raise CorpusError(f"--data: {path} has text for {len(chunks)} chunks of {chunk_tokens} tokens, not {limit}.")


def questions_over(
    tokenizer: Tokenizer, form: PromptFormat, chunks: Sequence[Sequence[int]], count: int, of: int, seed: int
) -> list[MarkedPrompt]:
    """Prompts over `of` chunks drawn at random each."""
    draw = random.Random(seed)  # noqa: S311
    preamble, question = form.preamble_ids(tokenizer), form.question_ids(tokenizer, _QUESTION)
    return [MarkedPrompt.assemble(preamble, draw.sample(list(chunks), of), question) for _ in range(count)]


def kv_memory(settings: EngineSettings, bytes_per_token: int, tokens: int, prompt_tokens: int, share: float) -> Row:
    """Fields of `EngineSettings` that give an engine KV memory for a share of a corpus, or for one prompt."""
    longest = prompt_tokens + _SPARE_TOKENS
    block = settings.block_tokens or 32
    least = (-(-longest // block) + _SPARE_BLOCKS) * block
    return {
        "kv_cache_bytes": max(int(share * tokens), least) * bytes_per_token,
        "max_model_len": longest,
        "max_num_seqs": 1,
    }


def bench_scale(
    started: Callable[[Row], LocalEngine],
    stores: Mapping[str, Row],
    prompts: Sequence[MarkedPrompt],
    ratio: float,
    progress: Callable[[str], Any],
    *,
    hot: bool,
) -> list[Row]:
    """A row for each store, and one for memory in front of the first, if `hot`.

    Args:
        started: starts an engine with such settings.
        stores: by tier, the settings that name it; the chunks of all prompts are in each.

    Raises:
        EngineError: a request was not blended from all of its chunks, so that there is nothing to measure.
    """
    options = BlendOptions(ratio=ratio)
    full: list[Completion] = []
    rows = []
    for tier, settings in stores.items():
        with started(settings) as engine:
            _ask(engine, prompts[:1], options)  # first-time costs
            blended = []
            for number, prompt in enumerate(prompts, start=1):
                progress(f"{tier}: question {number} of {len(prompts)}")
                if len(full) < number:
                    full += _ask(engine, [prompt], _OFF)
                blended += _ask(engine, [prompt], options)
        rows.append(_row(tier, blended, full, prompts))
    if hot:
        with started({**next(iter(stores.values())), "hot_bytes": _HOT_BYTES}) as engine:
            blended = []
            for number, prompt in enumerate(prompts, start=1):
                progress(f"memory: question {number} of {len(prompts)}")
                _ask(engine, [prompt] * _HOT_ASKED, options)
                blended += _ask(engine, [prompt], options)
        if any(not done.reuse.hot_tokens for done in blended):
            raise EngineError("What was read again and again was not in memory, so there is nothing to measure.")
        rows.insert(0, _row("memory", blended, full, prompts))
    return rows


def _ask(engine: LocalEngine, prompts: Iterable[MarkedPrompt], options: BlendOptions) -> list[Completion]:
    return [engine.generate(prompt, _ONE_TOKEN, options, cache_salt=uuid.uuid4().hex) for prompt in prompts]


def _row(tier: str, blended: Sequence[Completion], full: Sequence[Completion], prompts: Sequence[MarkedPrompt]) -> Row:
    wanted = sum(segment.length for prompt in prompts for segment in prompt.segments)
    missed = sum(done.reuse.missed_tokens for done in blended)
    if any(done.reuse.mode != "blend" for done in blended):
        reason = next(done.reuse.reason for done in blended if done.reuse.mode != "blend")
        raise EngineError(f"{tier}: a question was not blended ({reason}), so there is nothing to measure.")
    pairs = list(zip(full, blended, strict=True))
    return {
        "tier": tier,
        "ttft_blend_s": round(statistics.median(done.ttft_s for done in blended), 4),
        "ttft_full_s": round(statistics.median(done.ttft_s for done in full), 4),
        "speedup": round(statistics.median(plain.ttft_s / done.ttft_s for plain, done in pairs), 2),
        "load_ms": round(1000 * statistics.median(done.reuse.phases_s["load"] for done in blended), 1),
        "hit_rate": round(1 - missed / wanted, 4),
        "questions": len(blended),
    }
