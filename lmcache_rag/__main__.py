"""`python -m lmcache_rag` is `lmcache-rag`."""

from lmcache_rag.cli import main

main()
