"""Documents that change: only what is new is computed, and what is gone is deleted from the store.

python examples/reindex.py
"""

import shutil
import tempfile
from pathlib import Path

from lmcache_rag import LocalEngine
from lmcache_rag.corpus import IndexSettings, open_corpus, updating

CORPUS = Path(__file__).parent / "corpus"


def stored(engine: LocalEngine) -> int:
    chunks = engine.chunk_store().records
    return sum(bool(chunks.variants(key)) for key in chunks.keys())  # noqa: SIM118  # no mapping


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        documents, index = Path(temporary, "documents"), Path(temporary, "index")
        documents.mkdir()
        for path in sorted(CORPUS.glob("0[1-3]-*.md")):
            shutil.copy(path, documents)
        with updating(index), open_corpus(index, IndexSettings(chunk_tokens=300), create=True) as (engine, corpus):

            def update() -> None:
                report = corpus.update(corpus.plan_update([documents]))
                print(
                    f"{report.added} added, {report.changed} changed, {report.removed} removed: "
                    f"{report.chunks_computed} passages computed, {report.chunks_present} present; "
                    f"{stored(engine)} passages in the store"
                )

            update()
            changed = documents / "03-unpacking.md"
            changed.write_text(changed.read_text() + "\n\nThe box also holds a spare key for the battery door.\n")
            (documents / "02-specifications.md").unlink()
            update()
            print(corpus.search("Where is the spare key for the battery door?", 1)[0].text.splitlines()[-1])


if __name__ == "__main__":
    main()
