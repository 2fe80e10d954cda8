"""Index the handbook in `examples/corpus`, ask twelve questions, and compare blended answers with plain prefill.

    make demo

Each question has an expected phrase, which a right answer contains. Of thirty questions these are the twelve that the
default model, which is very small, answers right with plain prefill.
"""

import json
import statistics
import sys
from pathlib import Path

from lmcache_rag import BlendOptions, LmcacheRagError, Sampling
from lmcache_rag.asking import describe
from lmcache_rag.corpus import IndexSettings, open_corpus, updating
from lmcache_rag.terminal import out

HERE = Path(__file__).parent
INDEX = HERE / ".index"
PASSAGES = 5
PLAIN = BlendOptions(mode="off")
BLENDED = BlendOptions(selector="query", ratio=0.1)


def main() -> None:
    questions = json.loads((HERE / "questions.json").read_text())
    with updating(INDEX), open_corpus(INDEX, IndexSettings(chunk_tokens=350), create=True) as (engine, corpus):
        plan = corpus.plan_update([HERE / "corpus"])
        out.print(f"{len(plan.pending)} documents to read, {plan.tokens} tokens, {plan.report.unchanged} unchanged")
        with out.progress() as progress:
            task = progress.add_task("precomputing KV", total=plan.tokens)
            report = corpus.update(
                plan,
                lambda tokens: progress.advance(task, tokens),
                lambda note: progress.update(task, description=note),
            )
        out.print(f"{report.chunks_computed} passages computed, {report.bytes_stored / 1e6:.0f} MB stored\n")

        sampling = Sampling(max_tokens=32, stop=corpus.manifest.prompt.stop)
        warm_up = corpus.prompt("What is this?", corpus.search("What is this?", PASSAGES))
        for options in (PLAIN, BLENDED):
            engine.generate(warm_up, Sampling(max_tokens=1), options)

        right, speedups = {"plain": 0, "blended": 0}, []
        for number, item in enumerate(questions):
            question, expected = item["question"], item["expected"]
            hits = corpus.search(question, PASSAGES)
            prompt = corpus.prompt(question, hits)
            answers = {
                "plain": engine.generate(prompt, sampling, PLAIN, cache_salt=f"plain {number}"),
                "blended": engine.generate(prompt, sampling, BLENDED, cache_salt=f"blended {number}"),
            }
            out.print(question, style="bold")
            for name, answer in answers.items():
                contains = expected.lower() in answer.text.lower()
                right[name] += contains
                mark = "" if contains else f"   (expected: {expected})"
                out.print(f"  {name:8} TTFT {answer.ttft_s:6.3f} s  {answer.text.strip()}{mark}")
            speedups.append(answers["plain"].ttft_s / answers["blended"].ttft_s)
            out.print(f"  sources: {', '.join(dict.fromkeys(Path(hit.path).name for hit in hits))}", style="dim")
            out.print(f"  {describe(answers['blended'].reuse)}\n", style="dim")
        scores = ", ".join(f"{name} {count}/{len(questions)}" for name, count in right.items())
        out.print(f"expected phrase: {scores}, TTFT {statistics.median(speedups):.1f}x lower")


if __name__ == "__main__":
    try:
        main()
    except LmcacheRagError as error:
        sys.exit(f"error: {error}")
