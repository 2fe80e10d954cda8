"""`lmcache-rag`, and `python -m lmcache_rag`."""

from lmcache_rag.cli.interrupts import leaving_at_once


def main() -> None:
    """Entry point: the command line, which takes seconds to import."""
    with leaving_at_once():
        from lmcache_rag.cli.app import main as run
    run()


if __name__ == "__main__":
    main()
