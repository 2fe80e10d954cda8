"""Documents to passages of at most so many tokens, cut where the text itself has its joints."""

from __future__ import annotations

from lmcache_rag.corpus.documents import Document
from lmcache_rag.prompt import Tokenizer


def split(document: Document, tokenizer: Tokenizer, chunk_tokens: int, overlap_tokens: int) -> list[str]:
    """Passages of up to `chunk_tokens` tokens; consecutive ones share up to `overlap_tokens`."""
    from langchain_text_splitters import Language, RecursiveCharacterTextSplitter

    language = Language.MARKDOWN if document.is_markdown else None
    separators = RecursiveCharacterTextSplitter.get_separators_for_language(language) if language else None
    splitter = RecursiveCharacterTextSplitter(
        separators=separators,
        is_separator_regex=language is not None,
        chunk_size=chunk_tokens,
        chunk_overlap=overlap_tokens,
        length_function=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )
    return splitter.split_text(document.text)
