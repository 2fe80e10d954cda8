"""What an update of an index is going to do, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class UpdateReport:
    """What an update did.

    Attributes:
        restored: unchanged documents of which the store had lost some KV; counted as changed too.
        reprimed: unchanged documents computed behind the primer that a grown index has chosen; counted as changed too.
        evicted: objects deleted from the store to make room: its limit is too small for what is stored.
        refused: the files that cannot be used as they are, with the reason; each is named once, until it changes.
        refused_before: how many more were named by an earlier update.
        faults: what could not be read and is to be mended, with the reason; named at every update.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    restored: int = 0
    reprimed: int = 0
    refused: list[str] = field(default_factory=list)
    refused_before: int = 0
    faults: list[str] = field(default_factory=list)
    chunks_computed: int = 0
    chunks_present: int = 0
    tokens_computed: int = 0
    bytes_stored: int = 0
    evicted: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A document to compute, split and tokenised."""

    path: str
    digest: str
    texts: list[str]
    token_ids: list[list[int]]


@dataclass(frozen=True)
class UpdatePlan:
    """What an update is going to do.

    Attributes:
        pending: new and changed documents, and those to be restored or reprimed.
        removed: documents whose files are gone, or can no longer be used.
        refused: all files that cannot be used, path -> digest.
        former_primer: what the index's passages were computed behind before it had grown; empty where that stays.
        needed_bytes: so many at most are written to the store.
        free_bytes: so many are free there.
    """

    pending: list[Pending]
    removed: list[str]
    refused: dict[str, str]
    former_primer: list[int]
    report: UpdateReport
    tokens: int
    needed_bytes: int
    free_bytes: int | None

    @property
    def texts(self) -> list[str]:
        """The new passages."""
        return [text for item in self.pending for text in item.texts]
