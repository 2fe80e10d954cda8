"""LangChain: a chain in LCEL over the handbook, streamed and in batches, and documents that change.

python examples/langchain_lcel.py                              # starts an engine
python examples/langchain_lcel.py http://127.0.0.1:8000        # asks a server (`serve MODEL --clients-precompute`)
"""

import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_lmcache_rag import ChatLmcacheRag, KVVectorStore, LocalEmbeddings

from lmcache_rag import EngineSettings

CORPUS = Path(__file__).parent / "corpus"
PROMPT = PromptTemplate.from_template(
    "Answer from the passages.\n\nPassages:\n\n{context}\n\nQuestion: {question}\nAnswer:"
)


def main(base_url: str | None = None) -> None:
    where = {"settings": EngineSettings(max_model_len=4096)} if base_url is None else {"base_url": base_url}
    llm = ChatLmcacheRag(**where, max_tokens=32, stop=["\n"])
    store = KVVectorStore(InMemoryVectorStore(LocalEmbeddings()), llm, PROMPT)
    parts = (CORPUS / "08-power-and-battery.md").read_text().split("\n## ")
    ids = store.add_texts(parts)
    joined = store.as_retriever() | (lambda documents: "\n\n".join(each.page_content for each in documents))
    asked = {"context": joined, "question": RunnablePassthrough()} | PROMPT | llm
    for piece in (asked | StrOutputParser()).stream("What is the rated power of the solar panel?"):
        print(piece, end="", flush=True)
    print()
    for answer in asked.batch(["What must be done with the battery in winter?", "What charges the battery?"]):
        reuse = answer.response_metadata["reuse"]
        known = reuse["local_tokens"] + reuse["reused_tokens"] + reuse["recomputed_tokens"]
        print(f"{answer.text.strip()}\n  {known} of {reuse['prompt_tokens']} prompt tokens were known")
    store.delete(ids[-1:])  # its KV goes too
    llm.engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
