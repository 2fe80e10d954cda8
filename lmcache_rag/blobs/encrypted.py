"""Blobs encrypted at rest, with a key that the store never sees.

A blob is a salt of 16 bytes and then frames of 64 KiB, each encrypted by AES-256-GCM under a key of the blob's own
(HKDF of the store's key and the salt), so that a part of a blob is read without the rest. A frame's nonce is its
number, with a mark on the last one, and the blob's name is authenticated with each: what is damaged, cut short, in
another order or under another name is an error, as in the STREAM construction (Hoang et al. 2015,
https://eprint.iacr.org/2015/189).
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lmcache_rag.blobs.base import Store
from lmcache_rag.errors import CorruptObjectError, StoreError

KEY_VARIABLE = "LMCACHE_RAG_ENCRYPTION_KEY"
"""The environment variable that holds the key: 32 bytes in base64."""

_MARK = ".encrypted"

FRAME_BYTES = 64 << 10
_SALT_BYTES = 16
_TAG_BYTES = 16
_SEALED_BYTES = FRAME_BYTES + _TAG_BYTES
_KEY_BYTES = 32


class EncryptedStore:
    """Another store, in which all blobs are encrypted. Names are not: they tell namespaces, models and digests.

    Args:
        key: 32 bytes.

    Raises:
        StoreError: `cryptography` is missing.
        CorruptObjectError: by methods that read: it was not written with this key, or is damaged. Which of the two it
            is `opened_as_marked` has told before.
    """

    def __init__(self, store: Store, key: bytes) -> None:
        try:
            import cryptography  # noqa: F401
        except ImportError as error:
            raise StoreError("Encryption takes a package more: pip install 'lmcache-rag[encryption]'.") from error
        if len(key) != _KEY_BYTES:
            raise StoreError(f"The key of an encrypted store has {_KEY_BYTES} bytes, and this one {len(key)}.")
        self._store = store
        self._key = key

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        self._store.write(name, list(self._sealed(name, parts)))
        return sum(map(len, parts))

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        return self._store.write_if_absent(name, list(self._sealed(name, parts)))

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        first = start // FRAME_BYTES
        # One byte of the frame behind tells whether the last frame that is wanted is the blob's last.
        wanted = None if length is None else (-(-(start + length) // FRAME_BYTES) - first) * _SEALED_BYTES + 1
        salt: memoryview | None
        sealed: memoryview | None
        if first:
            salt = self._store.read(name, 0, _SALT_BYTES)
            sealed = self._store.read(name, _SALT_BYTES + first * _SEALED_BYTES, wanted)
        else:  # at once, since what is written anew meanwhile has another salt
            both = self._store.read(name, 0, None if wanted is None else _SALT_BYTES + wanted)
            salt, sealed = (None, None) if both is None else (both[:_SALT_BYTES], both[_SALT_BYTES:])
        if salt is None or sealed is None:
            return None
        opened = self._opened(name, bytes(salt), sealed, first, whole=wanted is None or len(sealed) < wanted)
        begin = start - first * FRAME_BYTES
        return memoryview(b"".join(opened))[begin : None if length is None else begin + length]

    def map(self, name: str) -> memoryview | None:
        return self.read(name)  # what is encrypted cannot be looked at where it lies

    def size(self, name: str) -> int | None:
        sealed = self._store.size(name)
        if sealed is None:
            return None
        frames = max(1, -(-(sealed - _SALT_BYTES) // _SEALED_BYTES))
        return max(0, sealed - _SALT_BYTES - frames * _TAG_BYTES)

    def heal(self, name: str) -> Store | None:
        healed = self._store.heal(name)
        return None if healed is None else EncryptedStore(healed, self._key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _sealed(self, name: str, parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
        salt = os.urandom(_SALT_BYTES)
        cipher = self._cipher(salt)
        yield salt
        frames = _framed(parts)
        frame, number = next(frames), 0
        for following in frames:
            yield cipher.encrypt(_nonce(number, last=False), frame, name.encode())
            frame, number = following, number + 1
        yield cipher.encrypt(_nonce(number, last=True), frame, name.encode())

    def _opened(self, name: str, salt: bytes, sealed: memoryview, first: int, *, whole: bool) -> Iterator[bytes]:
        """The frames in `sealed`.

        Args:
            first: the number of the first one.
            whole: they reach the blob's end.
        """
        from cryptography.exceptions import InvalidTag

        cipher = self._cipher(salt)
        frames = -(-len(sealed) // _SEALED_BYTES) if whole else len(sealed) // _SEALED_BYTES
        frames = max(frames, int(whole and not first))  # each blob has one
        for number in range(frames):
            frame = sealed[number * _SEALED_BYTES : (number + 1) * _SEALED_BYTES]
            last = whole and number == frames - 1
            try:
                yield cipher.decrypt(_nonce(first + number, last=last), frame, name.encode())
            except InvalidTag as error:
                raise CorruptObjectError(
                    f"{name} cannot be decrypted: it is damaged, or was written with another key or with none."
                ) from error

    def _cipher(self, salt: bytes) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return AESGCM(HKDF(SHA256(), _KEY_BYTES, salt, b"lmcache-rag blob").derive(self._key))


def opened_as_marked(store: Store, key: bytes | None) -> Store:
    """The store, with a key encrypted. A blob in it, written when it was empty, tells that it is, and with which key.
    So nobody takes what cannot be decrypted for damaged, and deletes it, or writes in the clear beside it.

    Raises:
        StoreError: it is encrypted and there is no key, or another one; or it is not encrypted, and there is a key.
    """
    if key is None:
        if store.read(_MARK) is not None:
            raise StoreError(f"The store is encrypted: set {KEY_VARIABLE} as it was when the store was made.")
        return store
    encrypted = EncryptedStore(store, key)
    if store.read(_MARK) is None:
        if any(not name.startswith(".unfinished") for name in store.folders("")):
            raise StoreError(
                f"The store is not encrypted, and cannot become so: unset {KEY_VARIABLE}, or name an empty store."
            )
        encrypted.write_if_absent(_MARK, [b"lmcache-rag"])
    try:
        encrypted.read(_MARK)
    except CorruptObjectError as error:
        raise StoreError(
            f"The store is encrypted with another key: set {KEY_VARIABLE} as it was when the store was made."
        ) from error
    return encrypted


def key_from_environment() -> bytes | None:
    """The key that the operator has set; None where there is none. Raises `StoreError` where it is none."""
    text = os.environ.get(KEY_VARIABLE)
    if not text:
        return None
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        raise StoreError(
            f"{KEY_VARIABLE} is no key of {_KEY_BYTES} bytes in base64: make one with `openssl rand -base64 32`."
        )
    return key


def _framed(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """The bytes of all parts in frames, of which only the last may be short, or empty."""
    frame = bytearray()
    for part in parts:
        rest = memoryview(part).cast("B")
        while len(rest):
            if len(frame) == FRAME_BYTES:
                yield bytes(frame)
                frame.clear()
            taken = FRAME_BYTES - len(frame)
            frame += rest[:taken]
            rest = rest[taken:]
    yield bytes(frame)


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
