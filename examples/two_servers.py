"""Two servers on one store: what one has computed, the other reuses, and a chat moves on where one is stopped.

lmcache-rag serve MODEL --store /srv/kv --port 8000 --clients-precompute
lmcache-rag serve MODEL --store /srv/kv --port 8001 --clients-precompute
python examples/two_servers.py http://127.0.0.1:8000 http://127.0.0.1:8001
"""

import sys
from pathlib import Path

from lmcache_rag import MarkedPrompt, Sampling
from lmcache_rag.engine import RemoteEngine

CORPUS = Path(__file__).parent / "corpus"


def main(*urls: str) -> None:
    first, both = RemoteEngine(urls[0]), RemoteEngine(urls)
    encode = first.tokenizer.encode
    preamble = encode("Answer from these passages.\n\n")
    chunks = [encode(path.read_text(), add_special_tokens=False)[:400] for path in sorted(CORPUS.glob("0[34]-*.md"))]
    report = first.precompute(preamble, chunks)
    report.check()
    print(f"stored through {urls[0]}: {report.computed} computed, {report.present} present")
    question = encode("\nQuestion: What is in the box?\nAnswer:", add_special_tokens=False)
    prompt = MarkedPrompt.assemble(preamble, chunks, question)
    for url in urls:
        answer = RemoteEngine(url).generate(prompt, Sampling(max_tokens=24, stop=("\n",)))
        print(f"{url}: {answer.reuse.reused_tokens} of {answer.prompt_tokens} tokens reused: {answer.text.strip()}")
    answers = [both.generate(prompt, Sampling(max_tokens=1)) for _ in range(4)]
    print(f"four requests spread over both: {[answer.reuse.mode for answer in answers]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
