"""Choosing forms: the highest fidelity that is in time, lower ones when the store becomes slow, computing when that is
faster."""

from __future__ import annotations

from lmcache_rag.blend.streaming import Stream
from lmcache_rag.chunk_kv import StoredForm
from lmcache_rag.plan.plan import PlannedSegment

HIGH, BALANCED, SMALL = 300, 200, 100


def segment(number: int) -> PlannedSegment:
    sizes = {"high": HIGH, "balanced": BALANCED, "small": SMALL}
    forms = tuple(StoredForm(f"{number}.{form}", size) for form, size in sizes.items())
    return PlannedSegment(number * 10, 10, name=f"{number}.balanced", forms=forms)


class Store:
    """A stream over a store that takes `bytes_per_s`; time only passes while it is read."""

    def __init__(self, count: int, seconds: float, known: float | None, tokens_per_s: float = 0.001) -> None:
        self.now = 100.0
        self.stream = Stream(
            [segment(number) for number in range(count)], seconds, known, tokens_per_s, clock=lambda: self.now
        )

    def read(self, count: int, bytes_per_s: float) -> list[str]:
        """The forms chosen of so many chunks."""
        chosen = []
        for _ in range(count):
            form = self.stream.choose()
            chosen.append("computed" if form is None else form.name.partition(".")[2])
            if form is not None:
                self.now += form.size_bytes / bytes_per_s
                self.stream.loaded(form, form.size_bytes)
        return chosen


def test_a_fast_store_gives_the_highest_fidelity() -> None:
    assert Store(6, 1.0, known=1e6).read(6, 1e6) == ["high"] * 6


def test_of_an_unknown_store_the_first_chunk_is_of_its_own_level() -> None:
    assert Store(6, 1.0, known=None).read(6, 1e6) == ["balanced"] + ["high"] * 5


def test_a_level_is_chosen_at_which_all_is_in_time() -> None:
    store = Store(6, 1.0, known=1250.0)
    assert store.read(6, 1250.0) == ["balanced"] * 6
    assert store.now - 100.0 <= 1.0


def test_a_store_that_becomes_slow_is_met_with_a_lower_level() -> None:
    store = Store(10, 1.2, known=3000.0)
    assert store.read(3, 3000.0) == ["high"] * 3
    later = store.read(7, 1000.0)
    assert later[0] == "high" and later[-1] == "small"  # seen after one slow chunk
    assert later.index("small") <= 2


def test_a_store_that_becomes_fast_again_is_seen_too() -> None:
    store = Store(20, 2.0, known=500.0)
    assert store.read(3, 500.0) == ["small"] * 3
    assert store.read(17, 1e5)[-10:] == ["high"] * 10


def test_a_stall_counts_before_it_has_ended() -> None:
    store = Store(4, 1.0, known=3000.0)
    store.read(1, 3000.0)
    under_way = store.stream.choose()
    store.now += 0.6
    assert under_way is not None and under_way.name == "1.high"
    chosen = store.stream.choose()
    assert chosen is not None and chosen.name == "2.small"


def test_what_is_faster_to_compute_is_computed() -> None:
    assert Store(3, 1.0, known=10.0, tokens_per_s=1000.0).read(3, 10.0) == ["computed"] * 3
    assert Store(3, 1.0, known=10.0, tokens_per_s=0.5).read(3, 10.0) == ["small"] * 3


def test_what_is_larger_and_worse_is_never_chosen() -> None:
    """q4 takes more than balanced and is further from the truth; of equal size, the better one is taken too."""
    sizes = {"high": 300, "balanced": 200, "q4": 260, "small": 100, "cachegen": 100}
    forms = tuple(StoredForm(f"0.{form}", size) for form, size in sizes.items())

    def chosen(seconds: float, bytes_per_s: float | None, own: str = "balanced") -> str:
        segment = PlannedSegment(0, 10, name=f"0.{own}", forms=forms)
        form = Stream([segment], seconds, bytes_per_s, 0.001, clock=lambda: 100.0).choose()
        assert form is not None
        return form.name

    assert [chosen(seconds, 1.0) for seconds in (300, 299, 200, 199, 1)] == [
        "0.high", "0.balanced", "0.balanced", "0.small", "0.small"
    ]  # fmt: skip
    assert chosen(1.0, None, own="q4") == "0.balanced"  # the store's rate is not known yet
    assert chosen(1.0, None, own="cachegen") == "0.small"


def test_chunks_that_are_not_stored_are_computed() -> None:
    stream = Stream([PlannedSegment(0, 10, name="gone")], 1.0, None, 1.0)
    assert stream.choose() is None
