"""LlamaIndex: a chat engine with memory over the handbook. Each turn has its own passages; what was said is remembered.

python examples/llama_index_chat.py                              # starts an engine
python examples/llama_index_chat.py http://127.0.0.1:8000        # asks a server (`serve MODEL --clients-precompute`)
"""

import sys
from pathlib import Path

from llama_index.core import Settings, SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.lmcache_rag import KVPrecompute, KVVectorStore, LmcacheRag
from llama_index.llms.lmcache_rag.embedding import LocalEmbedding

from lmcache_rag import EngineSettings

CORPUS = Path(__file__).parent / "corpus"
FILES = [CORPUS / "03-unpacking.md", CORPUS / "08-power-and-battery.md"]


def main(base_url: str | None = None) -> None:
    where = {"settings": EngineSettings(max_model_len=4096)} if base_url is None else {"base_url": base_url}
    llm = LmcacheRag(**where, max_tokens=32, stop=("\n",))
    Settings.llm, Settings.embed_model, Settings.chunk_size, Settings.chunk_overlap = llm, LocalEmbedding(), 256, 0
    storage = StorageContext.from_defaults(vector_store=KVVectorStore(SimpleVectorStore(), KVPrecompute(llm)))
    index = VectorStoreIndex.from_documents(SimpleDirectoryReader(input_files=FILES).load_data(), storage)
    chat = index.as_chat_engine(
        chat_mode="context", memory=ChatMemoryBuffer.from_defaults(token_limit=1024), similarity_top_k=3
    )
    for question in ("What is in the box?", "How is the battery charged?", "And in winter?"):
        answer = chat.chat(question)
        reuse = llm.last_reuse
        known = reuse.local_tokens + reuse.reused_tokens + reuse.recomputed_tokens
        print(f"{question} {str(answer).strip()}\n  {known} of {reuse.prompt_tokens} prompt tokens were known")
    llm.engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
