"""Learn the codec tables of the default model that ship with the package.

    python -m lmcache_rag.bench.default_tables FILE...

Half of the prompts are passages of the files, half are built-in ones, as when an index learns them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.learn.shipped import SHIPPED
from lmcache_rag.learn.texts import built_in_texts, mixed, read_texts
from lmcache_rag.model import DEFAULT_MODEL


def main(files: list[str]) -> None:
    texts = [text for file in files for text in read_texts(Path(file))]
    with tempfile.TemporaryDirectory() as store:
        settings = EngineSettings(model=DEFAULT_MODEL, store=store, dtype="float32", kv_cache_bytes=512 << 20)
        with LocalEngine(settings) as engine:
            prompts = mixed(engine.codec.prompts(texts), engine.codec.prompts(built_in_texts()))
            tables = engine.codec.learn(prompts, lambda note: print(note, file=sys.stderr))
    SHIPPED.write_bytes(tables.to_bytes())
    print(f"{SHIPPED}: tables {tables.digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
