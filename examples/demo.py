"""Index the handbook in `examples/corpus`, ask twelve questions, and compare blended answers with plain prefill.

    make demo

One document is indexed and asked about first, since that takes seconds; then the others. Each question has an expected
phrase, which a right answer contains. Of thirty questions these are the twelve that the default model, which is very
small, answers right with plain prefill.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lmcache_rag import BlendOptions, LmcacheRagError, LocalEngine, Sampling
from lmcache_rag.cli.ask import describe
from lmcache_rag.corpus import Corpus, IndexSettings, open_corpus, updating
from lmcache_rag.engine import Completion
from lmcache_rag.terminal import out

HERE = Path(__file__).parent
INDEX = HERE / ".index"
FIRST = HERE / "corpus" / "02-specifications.md"
FIRST_QUESTION = "What is the size of the flash memory of the logger?"
PASSAGES = 5
MODES = {"plain": BlendOptions(mode="off"), "blended": BlendOptions()}


def main() -> None:
    began = time.monotonic()
    questions = json.loads((HERE / "questions.json").read_text())
    with updating(INDEX), open_corpus(INDEX, IndexSettings(chunk_tokens=350), create=True) as (engine, corpus):
        index(corpus, FIRST)
        first = answers(engine, corpus, FIRST_QUESTION, "first")["blended"]
        out.print(FIRST_QUESTION, style="bold")
        out.print(f"  {first.text.strip()}\n  first blended answer after {time.monotonic() - began:.0f} s\n")
        index(corpus, HERE / "corpus")
        answers(engine, corpus, "What is this?", "warm-up")

        right, speedups = dict.fromkeys(MODES, 0), []
        for number, item in enumerate(questions):
            found = answers(engine, corpus, item["question"], str(number))
            for name, answer in found.items():
                right[name] += item["expected"].lower() in answer.text.lower()
            speedups.append(found["plain"].ttft_s / found["blended"].ttft_s)
            show(corpus, item, found)
        scores = ", ".join(f"{name} {count}/{len(questions)}" for name, count in right.items())
        out.print(f"expected phrase: {scores}, TTFT {statistics.median(speedups):.1f}x lower")


def index(corpus: Corpus, path: Path) -> None:
    """Do what is new or changed in a path."""
    plan = corpus.plan_update([path])
    out.print(f"{len(plan.pending)} documents to read, {plan.tokens} tokens, {plan.report.unchanged} unchanged")
    with out.progress() as progress:
        task = progress.add_task("precomputing KV", total=plan.tokens)
        report = corpus.update(
            plan,
            lambda tokens: progress.advance(task, tokens),
            lambda note: progress.update(task, description=note),
        )
    out.print(f"{report.chunks_computed} passages computed, {report.bytes_stored / 1e6:.0f} MB stored\n")


def answers(engine: LocalEngine, corpus: Corpus, question: str, salt: str) -> dict[str, Completion]:
    """The answer in each mode; no mode, and no salt, finds another's KV in vLLM's prefix cache."""
    prompt = corpus.prompt(question, corpus.search(question, PASSAGES))
    sampling = Sampling(max_tokens=32, stop=corpus.manifest.prompt.stop)
    return {
        name: engine.generate(prompt, sampling, options, cache_salt=f"{name} {salt}") for name, options in MODES.items()
    }


def show(corpus: Corpus, item: Mapping[str, str], found: Mapping[str, Completion]) -> None:
    """A question, its answers and where they are from."""
    out.print(item["question"], style="bold")
    for name, answer in found.items():
        mark = "" if item["expected"].lower() in answer.text.lower() else f"   (expected: {item['expected']})"
        out.print(f"  {name:8} TTFT {answer.ttft_s:6.3f} s  {answer.text.strip()}{mark}")
    hits = corpus.search(item["question"], PASSAGES)
    out.print(f"  sources: {', '.join(dict.fromkeys(Path(hit.path).name for hit in hits))}", style="dim")
    out.print(f"  {describe(found['blended'].reuse)}\n", style="dim")


if __name__ == "__main__":
    try:
        main()
    except LmcacheRagError as error:
        sys.exit(f"error: {error}")
