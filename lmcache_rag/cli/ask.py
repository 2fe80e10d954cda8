"""`lmcache-rag ask`: one question over an index; and how answers are shown."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lmcache_rag.cli.start import asked
from lmcache_rag.cli.trace import write_trace
from lmcache_rag.errors import PromptError
from lmcache_rag.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions, ReuseReport
from lmcache_rag.terminal import (
    DEFAULT_INDEX,
    DtypeOption,
    IndexOption,
    MaxTokensOption,
    ModelOption,
    PassagesOption,
    RatioOption,
    SelectorOption,
    ServerOption,
    TargetKLOption,
    ThreadsOption,
    TiersOption,
    given,
    out,
)

if TYPE_CHECKING:
    from lmcache_rag.corpus import Hit
    from lmcache_rag.engine import Completion, Engine

NOTHING = "Nothing was answered: the passages found do not seem to say anything about it."


def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    folder: IndexOption = DEFAULT_INDEX,
    server: ServerOption = None,
    model: ModelOption = None,
    passages: PassagesOption = 5,
    selector: SelectorOption = DEFAULT_SELECTOR,
    target_kl: TargetKLOption = DEFAULT_TARGET_KL,
    ratio: RatioOption = None,
    max_tokens: MaxTokensOption = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with plain prefill, and show both.")] = False,
    off: Annotated[bool, typer.Option("--off", help="Answer with plain prefill only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trace: Annotated[
        Optional[Path], typer.Option(help="Write a page that shows what each token of the prompt came from.")
    ] = None,
    tiers: TiersOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer a question from the indexed documents, with their stored KV."""
    from lmcache_rag.corpus import IndexSettings
    from lmcache_rag.engine import Sampling

    if not question.strip():
        raise PromptError("The question is empty.")
    options = BlendOptions.checked(mode="off" if off else "blend", selector=selector, target_kl=target_kl, ratio=ratio)
    settings, engine_options = IndexSettings.checked(model=model), given(dtype=dtype, threads=threads, tiers=tiers)
    engine_options["trace"] = trace is not None
    with asked(server, folder, settings, **engine_options) as (engine, corpus):
        hits = corpus.search(question, passages)
        prompt = corpus.prompt(question, hits)
        sampling = Sampling(max_tokens=max_tokens, stop=corpus.manifest.prompt.stop)
        if server is None:
            warm_up(engine, prompt.token_ids)
        for delta in engine.stream(prompt, sampling, options):
            if not as_json:
                out.print(delta.text, end="")
            answer = delta.completion
        assert answer is not None
        if trace is not None:
            write_trace(trace, engine.tokenizer, prompt.token_ids, answer)
        plain = engine.generate(prompt, sampling, BlendOptions(mode="off"), cache_salt=_nobodys()) if compare else None
    if as_json:
        result = as_row(answer, hits)
        if plain is not None:
            result["plain"] = {"answer": plain.text.strip(), "ttft_s": round(plain.ttft_s, 4)}
        print(json.dumps(result, indent=2))
        return
    show_end(answer, hits)
    if plain is not None:
        out.print(
            f"\nPlain prefill: {plain.text.strip() or NOTHING}\nTTFT {plain.ttft_s:.3f} s, "
            f"{plain.ttft_s / answer.ttft_s:.1f}x that of the blended answer"
        )


def warm_up(engine: Engine, token_ids: Sequence[int]) -> None:
    """Have the engine compute something, which takes longer the first time."""
    from lmcache_rag.engine import Sampling

    engine.generate(token_ids[:64], Sampling(max_tokens=1), BlendOptions(mode="off"), cache_salt=_nobodys())


def _nobodys() -> str:
    """A cache salt of which nothing is in any prefix cache."""
    return uuid.uuid4().hex


def as_row(answer: Completion, hits: Sequence[Hit]) -> dict[str, Any]:
    """An answer for `--json`."""
    text = answer.text.strip()
    return {
        "answer": text,
        "answered": bool(text),
        "sources": [{"path": hit.path, "text": hit.text, "score": round(hit.score, 4)} for hit in hits],
        "reuse": answer.reuse.model_dump(),
        "ttft_s": round(answer.ttft_s, 4),
    }


def show_end(answer: Completion, hits: Sequence[Hit]) -> None:
    """What is shown behind an answer's text: that there is none, its sources, what was reused."""
    out.print("\n" if answer.text.strip() else f"{NOTHING}\n")
    for number, hit in enumerate(hits, start=1):
        out.print(f"{number}. {hit.path}: {' '.join(hit.text.split())[:100]}...", style="dim")
    out.print(f"\n{describe(answer.reuse)}\nTTFT {answer.ttft_s:.3f} s")


def describe(reuse: ReuseReport) -> str:
    """A reuse report in a sentence."""
    if reuse.mode in ("off", "plain", "continued"):
        share = f"{reuse.local_tokens} in the prefix cache, the rest" if reuse.local_tokens else "all"
        return f"{reuse.prompt_tokens} prompt tokens, {share} by plain prefill ({reuse.reason})"
    parts = [
        f"{reuse.reused_tokens} reused",
        f"{reuse.recomputed_tokens} recomputed ({reuse.selector}, r={reuse.ratio:g})",
        f"{reuse.missed_tokens} missed" + "".join(f", {tokens} {why}" for why, tokens in reuse.misses.items()),
        f"{reuse.unknown_tokens + reuse.vllm_tokens} new",
    ]
    if reuse.local_tokens:
        parts.append(f"{reuse.local_tokens} in the prefix cache")
    phases = ", ".join(f"{phase} {1000 * seconds:.0f} ms" for phase, seconds in reuse.phases_s.items())
    return (
        f"{reuse.prompt_tokens} prompt tokens: {', '.join(parts)}; {reuse.bytes_loaded / 1e6:.1f} MB loaded ({phases})"
    )
