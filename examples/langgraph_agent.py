"""LangGraph: an agent that looks passages up by a tool, which it has to call first, and answers from what it found.

    pip install langgraph
    python examples/langgraph_agent.py                              # starts an engine
    python examples/langgraph_agent.py http://127.0.0.1:8000        # asks a server (`lmcache-rag serve MODEL`)

The default model was never trained to call tools; forced to, it writes a call by a grammar. With a model that was,
leave `tool_choice` out.
"""

import sys
from pathlib import Path

from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_lmcache_rag import ChatLmcacheRag, LocalEmbeddings
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from lmcache_rag import EngineSettings

CORPUS = Path(__file__).parent / "corpus"


def main(base_url: str | None = None) -> None:
    where = {"settings": EngineSettings(max_model_len=4096)} if base_url is None else {"base_url": base_url}
    llm = ChatLmcacheRag(**where, max_tokens=64, chat_template=True)
    store = InMemoryVectorStore(LocalEmbeddings())
    store.add_texts((CORPUS / "03-unpacking.md").read_text().split("\n## "))

    @tool
    def look_up(topic: str) -> str:
        """Passages of the handbook about a topic."""
        return "\n\n".join(document.page_content for document in store.similarity_search(topic, 2))

    def call(state: MessagesState) -> dict:
        forced = llm.bind_tools([look_up], tool_choice="look_up", parallel_tool_calls=False)
        return {"messages": [forced.invoke(state["messages"])]}

    def answer(state: MessagesState) -> dict:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("call", call)
    graph.add_node("tools", ToolNode([look_up]))
    graph.add_node("answer", answer)
    for before, after in ((START, "call"), ("call", "tools"), ("tools", "answer"), ("answer", END)):
        graph.add_edge(before, after)
    messages = graph.compile().invoke({"messages": [("human", "What is in the box?")]})["messages"]
    for message in messages:
        message.pretty_print()
    llm.engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
