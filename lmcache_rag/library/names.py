"""What stored objects are called."""

from __future__ import annotations

import hashlib

from lmcache_rag.chunk_kv import KVScope, codec_in
from lmcache_rag.codec.container import FORMAT_VERSION

_CHATS = ".chats"
_LEARNED = ".learned"


def object_name(scope: KVScope, key: bytes, form: str) -> str:
    """Where the object of a chunk in this form is kept; see `form_of`."""
    return f"{scope.folder(key)}{form}.v{FORMAT_VERSION}"


def parsed(name: str) -> tuple[bytes, str, int]:
    """Key, form and format version of an object's name. Raises `ValueError` where it is none."""
    stem, _, version = name.rpartition(".v")
    *_, key, form = stem.split("/")
    return bytes.fromhex(key), form, int(version)


def codec_of(name: str) -> str:
    """In which codec K and V are that are read from the object of this name."""
    return codec_in(parsed(name)[1])


def chats_of(namespace: str, cache_salt: str | None) -> str:
    """The namespace of the conversations beside a namespace of chunks. No request can name it: it has a dot."""
    return f"{namespace}{_CHATS}{_of_salt(cache_salt)}"


def learned_of(namespace: str, cache_salt: str | None) -> str:
    """The namespace of text that recurred in a caller's prompts, beside a namespace of chunks. No request can name it,
    and no other caller's prompts are matched with it."""
    return f"{namespace}{_LEARNED}{_of_salt(cache_salt)}"


def is_chats(namespace: str) -> bool:
    """Whether it is one of conversations."""
    return _CHATS in namespace


def is_learned(namespace: str) -> bool:
    """Whether it is one of text that recurred in prompts."""
    return _LEARNED in namespace


def is_incidental(namespace: str) -> bool:
    """Whether nobody asked for what it holds to be stored: conversations, and text that recurred."""
    return is_chats(namespace) or is_learned(namespace)


def beside(namespace: str) -> str:
    """The namespace of chunks that one of conversations or learned text lies beside; any other is its own."""
    return namespace.partition(".")[0]


def _of_salt(cache_salt: str | None) -> str:
    return "" if cache_salt is None else f"-{hashlib.blake2b(cache_salt.encode(), digest_size=8).hexdigest()}"
