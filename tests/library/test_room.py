"""What a namespace may hold: the limit, what goes first, how long things are kept, and clocks and disks that fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of, variant_of
from lmcache_rag.conversation.prefixes import PIECE_TOKENS, pieces, stored_pieces
from lmcache_rag.errors import StoreError
from lmcache_rag.library import chunks as module
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.eviction import EVICTION, Candidates
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.names import chats_of, learned_of
from lmcache_rag.library.room import DAY_S, Limits, Rooms
from lmcache_rag.library.tables import ModelCodecs
from tests.stores import FailingStore, MemoryStore

SHAPE = KVShape(layers=2, kv_heads=1, head_size=8, dtype=torch.float32)
MODEL = "f" * 32
PREAMBLE = np.arange(7, dtype=np.int32)
VARIANT = variant_of(PREAMBLE)
TOKENS = 64
NOW = 1_800_000_000


class Clock:
    """One that is set by hand."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "_now", lambda: int(clock()))
    return clock


def opened(
    store: object, clock: Clock, limits: Limits, namespace: str = "docs", rooms: Rooms | None = None
) -> ChunkStore:
    """As another engine would open it."""
    rooms = rooms or Rooms(store, limits)  # type: ignore[arg-type]
    rooms.of(namespace)._clock = clock
    chunks = ChunkStore(store, KVScope(namespace, MODEL), "raw", ModelCodecs(store, MODEL, SHAPE), rooms=rooms)  # type: ignore[arg-type]
    chunks.uses._clock = clock
    chunks.refresh()
    return chunks


def chunk(number: int, tokens: int = TOKENS) -> ChunkKV:
    draw = np.random.default_rng(number)
    return ChunkKV(draw.integers(0, 1 << 20, tokens, dtype=np.int32), torch.zeros(2, 2, tokens, 1, 8))


def key(number: int) -> bytes:
    return key_of(chunk(number).token_ids)


def use(chunks: ChunkStore, number: int) -> None:
    loaded = chunks.load(chunks.name(chunk(number).token_ids, VARIANT), SHAPE)
    assert isinstance(loaded, LoadedKV)
    chunks.uses.flush()


def kept(chunks: ChunkStore, count: int) -> list[int]:
    chunks.refresh()
    return [number for number in range(count) if chunks.variants(key(number))]


def object_bytes(store: MemoryStore) -> int:
    return sum(len(data) for name, data in store.blobs.items() if not name.startswith("."))


def size() -> int:
    """Of one object."""
    return opened(MemoryStore(), Clock(), Limits()).save(chunk(0), VARIANT)


SIZE = size()


def limits(objects: float, **others: object) -> Limits:
    return Limits(int(objects * SIZE), **others)  # type: ignore[arg-type]


def test_the_limit_holds_and_what_was_used_longest_ago_goes(clock: Clock) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, limits(10.5))
    for number in range(9):
        clock.now += 3601
        chunks.save(chunk(number), VARIANT)
    clock.now += 3601
    use(opened(store, clock, Limits()), 0)  # by an engine without a limit
    for number in range(9, 30):
        clock.now += 3601
        chunks.save(chunk(number), VARIANT)
        assert object_bytes(store) <= 10.5 * SIZE
        if number == 10:
            found = kept(chunks, 11)
            assert 0 in found and 1 not in found
    assert kept(chunks, 30)[-8:] == list(range(22, 30))
    evicted = chunks._room.evicted  # type: ignore[union-attr]
    assert evicted.objects == 30 - len(kept(chunks, 30)) and evicted.size_bytes == evicted.objects * SIZE
    assert {name for name in store.blobs if not name.startswith(".")} == {
        form.name for number in kept(chunks, 30) for form in chunks.variants(key(number)).values()
    }


def test_preambles_and_what_is_pinned_are_never_evicted(clock: Clock) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, limits(6.5))
    chunks.save_preamble(ChunkKV(PREAMBLE, torch.zeros(2, 2, 7, 1, 8)))
    for number in range(2):
        chunks.save(chunk(number), VARIANT)
    chunks.pin([key(0)])
    for number in range(2, 20):
        clock.now += 10
        chunks.save(chunk(number), VARIANT)
    assert kept(chunks, 20)[0] == 0 and not chunks.lacks_preamble(PREAMBLE)
    chunks.unpin([key(0)])
    chunks.save(chunk(20), VARIANT)
    for number in range(21, 30):
        chunks.save(chunk(number), VARIANT)
    assert 0 not in kept(chunks, 1) and not chunks.lacks_preamble(PREAMBLE)


def test_where_all_is_pinned_the_error_says_what_to_do(clock: Clock) -> None:
    chunks = opened(MemoryStore(), clock, limits(3.5))
    for number in range(3):
        chunks.save(chunk(number), VARIANT)
    chunks.pin(key(number) for number in range(3))
    with pytest.raises(StoreError, match="larger capacity, or unpin"):
        chunks.save(chunk(3), VARIANT)
    assert kept(chunks, 4) == [0, 1, 2]


def test_what_an_index_owns_is_evicted_and_missing_and_let_go_of_later(clock: Clock) -> None:
    chunks = opened(MemoryStore(), clock, limits(3.5))
    chunks.save(chunk(0), VARIANT)
    chunks.own("index", [key(0)])
    for number in range(1, 5):
        clock.now += 10
        chunks.save(chunk(number), VARIANT)
    assert chunks.missing(chunk(0).token_ids, VARIANT) == ["raw"]
    chunks.release("index", [key(0)])
    chunks.save(chunk(0), VARIANT)
    chunks.own("index", [key(0)])
    assert 0 in kept(chunks, 1)


def test_several_engines_that_write_in_turn_keep_to_the_limit(clock: Clock) -> None:
    store = MemoryStore()
    engines = [opened(store, clock, limits(50)) for _ in range(3)]
    engines.append(opened(store, clock, limits(50), "docs.chats-1"))
    for number in range(200):
        clock.now += 1
        engines[number % 4].save(chunk(number), VARIANT)
        assert object_bytes(store) <= 51 * SIZE  # 2%
    assert object_bytes(store) > 40 * SIZE


def converse(chats: ChunkStore, seed: int, turns: int, said: int = 0) -> list[int]:
    """Store the beginning of a conversation; returns its tokens."""
    tokens = np.random.default_rng([seed, 1]).integers(0, 1 << 20, PIECE_TOKENS * turns).tolist()
    for piece in list(pieces(tokens))[said:]:
        chats.save(ChunkKV(piece.token_ids, torch.zeros(2, 2, PIECE_TOKENS, 1, 8)), piece.variant)
    return tokens


def test_conversations_go_first_and_their_ends_before_their_beginnings(clock: Clock) -> None:
    store = MemoryStore()
    rooms = Rooms(store, limits(20.5))  # type: ignore[arg-type]
    chunks = opened(store, clock, limits(20.5), rooms=rooms)
    chats = opened(store, clock, limits(20.5), chats_of("docs", "salt"), rooms)
    for number in range(10):
        chunks.save(chunk(number), VARIANT)
    clock.now += 7200
    converse(chats, 1, 4)
    clock.now += 1800
    new = converse(chats, 2, 3)
    clock.now += 1800
    old = converse(chats, 1, 5, 4)  # goes on: its beginning is needed as lately as its end, whatever is recorded of it
    lengths = []
    for number in range(10, 16):
        chunks.save(chunk(number), VARIANT)
        found = len(stored_pieces(chats, old)), len(stored_pieces(chats, new))
        assert sum(found) == len(chats.records.live().chunk)  # no piece without those before it
        lengths.append(found)
    assert lengths[0] == (5, 3) and (5, 0) in lengths and lengths[-1][0] < 5
    assert lengths == sorted(lengths, reverse=True)
    assert kept(chunks, 16) == list(range(16))


def test_a_conversation_evicts_no_chunk(clock: Clock) -> None:
    store = MemoryStore()
    rooms = Rooms(store, limits(8.5))  # type: ignore[arg-type]
    chunks = opened(store, clock, limits(8.5), rooms=rooms)
    for number in range(7):
        chunks.save(chunk(number), VARIANT)
    chats = opened(store, clock, limits(8.5), chats_of("docs", None), rooms)
    converse(chats, 1, 5)
    assert kept(chunks, 7) == list(range(7))
    assert object_bytes(store) <= 8.5 * SIZE


def test_learned_text_goes_before_chunks_and_evicts_none(clock: Clock) -> None:
    store = MemoryStore()
    rooms = Rooms(store, limits(8.5))  # type: ignore[arg-type]
    chunks = opened(store, clock, limits(8.5), rooms=rooms)
    learned = opened(store, clock, limits(8.5), learned_of("docs", "salt"), rooms)
    for number in range(5):
        chunks.save(chunk(number), VARIANT)
    clock.now += 100
    for number in range(10, 16):
        learned.save(chunk(number), VARIANT)
    assert kept(chunks, 5) == list(range(5)) and 0 < len(kept(learned, 16)) <= 3
    for number in range(5, 8):
        chunks.save(chunk(number), VARIANT)
    assert kept(chunks, 8) == list(range(8)) and kept(learned, 16) == []
    assert learned.save(chunk(20), VARIANT) == 0


def test_where_chunks_fill_the_limit_one_learned_text_does_not_drive_out_all_others(clock: Clock) -> None:
    store = MemoryStore()
    rooms = Rooms(store, limits(30))  # type: ignore[arg-type]
    chunks = opened(store, clock, limits(30), rooms=rooms)
    learned = opened(store, clock, limits(30), learned_of("docs", "salt"), rooms)
    for number in range(27):
        chunks.save(chunk(number), VARIANT)
    for number in range(30, 34):
        clock.now += 100
        learned.save(chunk(number), VARIANT)
    assert kept(learned, 34) == [32, 33]
    assert kept(chunks, 27) == list(range(27)) and object_bytes(store) <= 30 * SIZE


def test_learned_text_expires_as_conversations_do(clock: Clock) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, Limits(conversations_ttl_s=100.0))
    learned = opened(store, clock, Limits(conversations_ttl_s=100.0), learned_of("docs", None))
    for each in (chunks, learned):
        each.save(chunk(1), VARIANT)
    clock.now += 200
    expire(learned, by_clock=True)
    assert (kept(chunks, 2), kept(learned, 2)) == ([1], [])


def test_cost_weighs_bytes_against_computing() -> None:
    candidates = Candidates(
        tokens=np.array([100, 100, 100, 100]),
        size_bytes=np.array([1000, 8000, 1000, 8000]),
        age_s=np.array([10, 10, 5000, 5000]),
    )
    assert np.argsort(EVICTION["cost"](candidates)).tolist() == [3, 2, 1, 0]
    assert np.argsort(EVICTION["lru"](candidates), kind="stable").tolist() == [2, 3, 0, 1]
    same_age = Candidates(candidates.tokens, candidates.size_bytes, np.zeros(4, np.int64))
    assert set(np.argsort(EVICTION["cost"](same_age))[:2].tolist()) == {1, 3}


@pytest.mark.parametrize("name", EVICTION)
def test_every_policy_keeps_to_the_limit(clock: Clock, name: str) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, limits(10.5, eviction=name))
    for number in range(40):
        clock.now += 100
        chunks.save(chunk(number, 16 + 16 * (number % 5)), VARIANT)
        assert object_bytes(store) <= 10.5 * SIZE
    assert EVICTION[name](Candidates(*[np.zeros(0, np.int64)] * 3)).shape == (0,)


def expire(chunks: ChunkStore, *, by_clock: bool = False) -> int:
    room = chunks._room
    assert room is not None
    return room.expire(by_clock=by_clock).objects


def test_what_is_not_used_expires(clock: Clock) -> None:
    store = MemoryStore()
    own = Limits(ttl_s=10 * DAY_S)
    chunks = opened(store, clock, own)
    for number in range(3):
        chunks.save(chunk(number), VARIANT)
    chunks.pin([key(1)])
    for day in range(12):
        assert kept(chunks, 3) == ([0, 1, 2] if day < 11 else [0, 1])
        clock.now += DAY_S
        use(chunks, 0)
        opened(store, clock, own).save(chunk(100 + day), VARIANT)  # each day another process deletes what has expired


def test_conversations_expire_from_their_ends(clock: Clock) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, Limits())
    chats = opened(store, clock, Limits(), chats_of("docs", None))
    chunks.save(chunk(0), VARIANT)
    tokens = converse(chats, 1, 2)
    for _ in range(3):
        clock.now += 2 * DAY_S
        use(chunks, 0)
    converse(chats, 1, 3, 2)
    clock.now += 2 * DAY_S  # its beginning was stored eight days ago
    assert expire(chats, by_clock=True) == 0 and len(stored_pieces(chats, tokens)) == 2
    clock.now += 6 * DAY_S
    assert expire(chats, by_clock=True) == 3 and kept(chunks, 1) == [0]


YEARS = 10 * 365 * DAY_S


@pytest.mark.parametrize("jumps", [[YEARS], [-YEARS], [YEARS, -YEARS], [-YEARS, YEARS], [YEARS, YEARS]], ids=str)
def test_a_clock_that_jumps_deletes_not_everything(clock: Clock, jumps: list[float]) -> None:
    store = MemoryStore()
    own = limits(20.5, ttl_s=7 * DAY_S)
    for number in range(10):
        opened(store, clock, own).save(chunk(number), VARIANT)
        clock.now += 3600
    for number, jump in enumerate(jumps):
        clock.now += jump
        chunks = opened(store, clock, own)
        assert expire(chunks) == 0
        use(chunks, number)
        chunks.save(chunk(10 + number), VARIANT)
        assert expire(chunks) == 0
    assert len(kept(chunks, 12)) == 10 + len(jumps)
    for number in range(12, 30):  # and the limit still works
        chunks.save(chunk(number), VARIANT)
    assert 15 <= len(kept(chunks, 30)) <= 20


def test_a_use_in_the_future_is_put_right_by_the_next(clock: Clock) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, Limits())
    clock.now += YEARS
    chunks.save(chunk(0), VARIANT)
    clock.now -= YEARS
    use(chunks, 0)
    assert next(iter(chunks.variants(key(0)).values())).used_s == NOW


def test_uses_are_recorded_by_a_thread_and_not_more_often_than_worth_it(clock: Clock) -> None:
    store = MemoryStore()
    chunks = opened(store, clock, Limits())
    chunks.save(chunk(0), VARIANT)
    before = chunks.records.position
    chunks.uses._wait_s = 0.0
    chunks.load(chunks.name(chunk(0).token_ids, VARIANT), SHAPE)
    assert chunks.uses._timer is None and chunks.records.position == before  # it was stored just now
    clock.now += 3600
    chunks.load(chunks.name(chunk(0).token_ids, VARIANT), SHAPE)
    timer = chunks.uses._timer
    if timer is not None:
        timer.join()
    assert next(iter(opened(store, clock, Limits()).variants(key(0)).values())).used_s == NOW + 3600
    assert chunks.records.position[1] == before[1] + 1


def test_a_store_that_may_only_be_read_is_read(clock: Clock) -> None:
    store = MemoryStore()
    opened(store, clock, Limits()).save(chunk(0), VARIANT)
    clock.now += 7200
    before = dict(store.blobs)
    chunks = opened(FailingStore(store), clock, limits(1.5))
    use(chunks, 0)
    use(chunks, 0)
    assert store.blobs == before
    with pytest.raises(StoreError, match="full"):
        chunks.save(chunk(1), VARIANT)
    assert store.blobs == before


def _save(chunks: ChunkStore) -> None:
    chunks.save(chunk(1000), VARIANT)


def _evict(chunks: ChunkStore) -> None:
    for number in range(100, 104):
        chunks.save(chunk(number), VARIANT)


def _compact(chunks: ChunkStore) -> None:
    chunks.records.compact()


def _delete(chunks: ChunkStore) -> None:
    chunks.delete([key(9), key(8)])


@pytest.mark.parametrize("change", [_save, _evict, _compact, _delete])
def test_a_disk_that_is_full_at_any_moment(clock: Clock, change: Callable[[ChunkStore], None]) -> None:
    """What was stored stays so unless it was to be deleted, all that is recorded can be read, and it goes on later."""
    for left in range(60):
        store = MemoryStore()
        chunks = opened(store, clock, limits(10.5))
        for number in range(10):
            clock.now += 1
            chunks.save(chunk(number), VARIANT)
        failing = FailingStore(store, left)
        try:
            change(opened(failing, clock, limits(10.5)))
        except StoreError:
            done = False
        else:
            done = True
        again = opened(store, clock, limits(10.5))
        for each in list(again.records.keys()):
            for form in again.variants(each).values():
                assert isinstance(again.load(form.name, SHAPE), LoadedKV)
        if change is _compact:
            assert kept(again, 10) == list(range(10))
        change(again)
        assert again.records.size_bytes <= 10.5 * SIZE
        if done and failing.changes == left:
            return
        assert failing.changes >= left
        if done:
            return
    raise AssertionError("it never came to an end")
