"""The index's tables: documents, their passages and vectors. SQLite, so that a crash leaves the last whole document."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmcache_rag.errors import CorpusError
from lmcache_rag.process import OwnProcess

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS passages (
    id INTEGER PRIMARY KEY,
    document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    text TEXT NOT NULL,
    chunk_key TEXT NOT NULL,
    vector BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS passages_of_document ON passages (document);
CREATE INDEX IF NOT EXISTS passages_of_chunk ON passages (chunk_key);
CREATE TABLE IF NOT EXISTS unused_chunks (chunk_key TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS refused_files (path TEXT PRIMARY KEY, digest TEXT NOT NULL);
"""

_UPGRADE = """
BEGIN;
ALTER TABLE passages RENAME COLUMN kv_prefix TO chunk_key;
UPDATE passages SET chunk_key = substr(rtrim(chunk_key, '/'), -32);
DROP TABLE IF EXISTS unused_kv;
COMMIT;
"""


@dataclass(frozen=True)
class Passage:
    """One passage: its text, and its chunk's key (hex)."""

    text: str
    chunk_key: str
    vector: np.ndarray


class Database:
    """The tables in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = OwnProcess("The open index", CorpusError)
        with self._failing():
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._upgrade()
            self._connection.executescript(_SCHEMA)

    def _upgrade(self) -> None:
        """Tables of releases that kept the folder of a passage's KV, which the chunk's key ends."""
        columns = [row[1] for row in self._connection.execute("PRAGMA table_info (passages)")]
        if "kv_prefix" in columns:
            self._connection.executescript(_UPGRADE)

    def close(self) -> None:
        if self._process.is_here():
            self._connection.close()

    def documents(self) -> dict[str, str]:
        """path -> digest of every indexed document."""
        with self._failing():
            return dict(self._connection.execute("SELECT path, digest FROM documents"))

    def refused(self) -> dict[str, str]:
        """path -> digest of every file that cannot be used, as its user has been told."""
        with self._failing():
            return dict(self._connection.execute("SELECT path, digest FROM refused_files"))

    def set_refused(self, files: Mapping[str, str]) -> None:
        """Take these for all files (path -> digest) that cannot be used."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM refused_files")
            connection.executemany("INSERT INTO refused_files (path, digest) VALUES (?, ?)", files.items())

    def replace(self, path: str, digest: str, passages: Sequence[Passage]) -> None:
        """Put a document in, in the place of what was there under its path."""
        with self._transaction() as connection:
            self._remove(connection, path)
            document = connection.execute(
                "INSERT INTO documents (path, digest) VALUES (?, ?)", (path, digest)
            ).lastrowid
            connection.executemany(
                "INSERT INTO passages (document, text, chunk_key, vector) VALUES (?, ?, ?, ?)",
                [(document, passage.text, passage.chunk_key, passage.vector.tobytes()) for passage in passages],
            )

    def remove(self, path: str) -> None:
        """Take a document out."""
        with self._transaction() as connection:
            self._remove(connection, path)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 `[passages]` and vectors float32 `[passages, dimensions]` of all passages."""
        with self._failing():
            rows = self._connection.execute("SELECT id, vector FROM passages ORDER BY id").fetchall()
        ids = np.array([row[0] for row in rows], dtype=np.int64)
        vectors = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.float32)
        return ids, vectors.reshape(len(rows), -1) if rows else vectors.reshape(0, 0)

    def passage(self, passage_id: int) -> tuple[str, str] | None:
        """Path of its document and text of a passage; None where it is gone."""
        with self._failing():
            row = self._connection.execute(
                "SELECT path, text FROM passages JOIN documents ON documents.id = document WHERE passages.id = ?",
                (passage_id,),
            ).fetchone()
        return None if row is None else (row[0], row[1])

    def chunk_keys(self, path: str | None = None) -> list[str]:
        """The keys (hex) of the chunks that a document's passages are; without a path, those of all documents."""
        query, values = "SELECT chunk_key FROM passages", []
        if path is not None:
            query, values = f"{query} JOIN documents ON documents.id = document WHERE path = ?", [path]
        with self._failing():
            return [row[0] for row in self._connection.execute(query, values)]

    def passages_of(self, path: str) -> list[str]:
        """The texts of a document's passages, in order."""
        query = (
            "SELECT text FROM passages JOIN documents ON documents.id = document WHERE path = ? ORDER BY passages.id"
        )
        with self._failing():
            return [row[0] for row in self._connection.execute(query, (path,))]

    def version(self) -> tuple[int, int]:
        """Changes whenever this or another process has changed the tables."""
        with self._failing():
            return self._connection.execute("PRAGMA data_version").fetchone()[0], self._connection.total_changes

    def unused_chunks(self) -> list[str]:
        """The keys (hex) of chunks that lost their last passage and are not yet forgotten."""
        with self._failing():
            return [
                row[0]
                for row in self._connection.execute(
                    "SELECT chunk_key FROM unused_chunks WHERE chunk_key NOT IN (SELECT chunk_key FROM passages)"
                )
            ]

    def forget_unused_chunks(self) -> None:
        """The index no longer owns what `unused_chunks` named."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM unused_chunks")

    def _remove(self, connection: sqlite3.Connection, path: str) -> None:
        connection.execute(
            "INSERT OR IGNORE INTO unused_chunks SELECT chunk_key FROM passages "
            "WHERE document = (SELECT id FROM documents WHERE path = ?)",
            (path,),
        )
        connection.execute("DELETE FROM documents WHERE path = ?", (path,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._failing():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        self._process.check()  # SQLite's connections do not survive a fork
        try:
            yield
        except sqlite3.Error as error:
            raise CorpusError(
                f"The index file {self._path} cannot be used ({error}): check free space and permissions; "
                "if it is damaged, delete the index folder and index the documents again."
            ) from error
