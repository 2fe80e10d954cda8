"""Which passages a primer is made of."""

from __future__ import annotations

from lmcache_rag.learn.primer import SMALL_CORPUS, default_primer, own_primer, primer_ids
from lmcache_rag.prompt import PromptFormat
from tests.test_prompt import Letters

FORM = PromptFormat(preamble="p", chunk="<{text}>", question="{question}")


def test_it_is_spread_over_the_corpus_in_the_form_of_its_chunks() -> None:
    texts = [f"passage {number}" for number in range(60)]
    assert own_primer(texts, FORM) == "<passage 10><passage 30><passage 50>"
    assert own_primer(texts, FORM) == own_primer(list(texts), FORM)


def test_a_small_corpus_has_none_of_its_own() -> None:
    assert own_primer([], FORM) is own_primer(["one"] * (SMALL_CORPUS - 1), FORM) is None
    assert own_primer(["one"] * SMALL_CORPUS, FORM)
    assert len(default_primer().split("\n\n")) == 4


def test_it_is_cut_to_the_room_there_is() -> None:
    whole = primer_ids(Letters(), "a primer", 100)
    assert len(whole) == 8
    assert primer_ids(Letters(), "a primer", 5) == whole[:5]
    assert primer_ids(Letters(), "a primer", 0) == primer_ids(Letters(), "a primer", -3) == []
    assert primer_ids(Letters(), "", 100) == []
