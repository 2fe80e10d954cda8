"""What an index was made with. KV and tokens of one model are useless to another, so this is checked at every use."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmcache_rag.blobs.uri import StoreURI, resolved
from lmcache_rag.codec import DEFAULT_CODEC
from lmcache_rag.errors import CorpusError
from lmcache_rag.learn.primer import default_primer
from lmcache_rag.prompt import PromptFormat
from lmcache_rag.request import first_problem

_FILE = "manifest.json"
_VERSION = 2

PrimerSource = Literal["given", "own", "default"]


class Manifest(BaseModel):
    """Settings and identities of an index, in `manifest.json` in its folder.

    Attributes:
        model: as the user named it.
        store: URI of the KV store, or its folder, relative to the index where it lies in it. Caches in front of it are
            the machine's, and not noted here.
        codec: in which KV is stored.
        prompt: the prompt's form; chunk KV was computed behind its preamble.
        primer: the text of the passages behind which chunk KV was computed as well, cut to `primer_tokens`; empty for
            none. None, only before the first update, is for that to choose.
        owner: as what the index owns its chunks in the store, whichever other indexes do.
        primer_from: `given` by the user, the index's `own` passages, or the `default` of a small index, which chooses
            again when it has grown. None where an earlier release made the index.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = _VERSION
    model: str
    model_fingerprint: str
    dtype: str
    tokenizer_fingerprint: str
    namespace: str
    store: StoreURI
    codec: str = DEFAULT_CODEC
    prompt: PromptFormat
    primer: str | None = None
    primer_tokens: int | None = None
    primer_from: PrimerSource | None = None
    chunk_tokens: int
    overlap_tokens: int
    embedding_model: str
    owner: str = Field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of the index in `folder`; None where there is no index. Raises `CorpusError`."""
        path = folder / _FILE
        try:
            text = path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CorpusError(f"{path} cannot be read ({error.strerror}): change its permissions.") from error
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            raise CorpusError(
                f"{path} is damaged ({first_problem(error)}): delete {folder} and index the documents again."
            ) from None
        if manifest.version != _VERSION:
            raise CorpusError(
                f"The index {folder} has version {manifest.version}, and this release reads version {_VERSION}: "
                "index the documents into another folder."
            )
        return manifest

    @property
    def has_outgrowable_primer(self) -> bool:
        """Whether a larger index is to choose its primer anew."""
        if self.primer_from is None:
            return self.primer_tokens is not None and self.primer == default_primer()
        return self.primer_from == "default"

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
        part = folder / f"{_FILE}.part"
        with part.open("w") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / _FILE)

    def check(self, folder: Path, wanted: Manifest) -> None:
        """Compare with what is wanted now; raises `CorpusError` that names the first difference.

        An earlier release took fingerprints from the files as they were, which tells nothing now: the next update finds
        no KV under today's, and computes it.
        """
        names = {
            "model": "model",
            "dtype": "compute type",
            "model_fingerprint": "weights of the model",
            "tokenizer_fingerprint": "tokenizer",
            "namespace": "namespace",
            "codec": "codec",
            "prompt": "preamble or prompt form",
            "primer": "primer",
            "primer_tokens": "length of the primer",
            "chunk_tokens": "chunk length",
            "overlap_tokens": "overlap of chunks",
            "embedding_model": "embedding model",
        }
        if self.primer_from is None:
            del names["model_fingerprint"], names["tokenizer_fingerprint"]
        for field, name in names.items():
            was, now = getattr(self, field), getattr(wanted, field)
            if was != now:
                shown = "" if field in ("prompt", "primer") else f" ({was!r}, now {now!r})"
                raise CorpusError(
                    f"The index {folder} was made with another {name}{shown}: use that one, "
                    "or index the documents into another folder."
                )

    def store_uri(self, folder: Path) -> str:
        """Where the KV store is."""
        return resolved(self.store, folder)
