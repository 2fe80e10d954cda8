"""Storing in a thread: in order, errors to whoever asks, and no waiting for a store that hangs."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest

from lmcache_rag.errors import EngineError, StoreError
from lmcache_rag.vllm.saver import Saver


def test_in_order_and_all_of_it_before_it_closes() -> None:
    saver, begin, done = Saver(), threading.Event(), list[int]()
    saver.submit(begin.wait)
    saved = [saver.submit(done.append, number) for number in range(20)]
    assert not done
    begin.set()
    saver.close(lambda: done.append(20))
    assert done == list(range(21)) and all(one.done() for one in saved)
    saver.close(lambda: done.append(21))
    assert done[-1] == 20
    with pytest.raises(EngineError, match="closed"):
        saver.submit(done.append, 22)


def test_an_error_goes_to_whoever_asks() -> None:
    def fail() -> None:
        raise StoreError("the disk is full")

    saver = Saver()
    failed, other = saver.submit(fail), saver.submit(str, 7)
    with pytest.raises(StoreError, match="full"):
        failed.result()
    assert other.result() == "7"
    saver.close()


def test_a_store_that_hangs_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    saver, answer = Saver(), threading.Event()
    hanging = saver.submit(answer.wait)
    with caplog.at_level(logging.WARNING):
        saver.close(patience_s=0.01)
    assert "did not answer" in caplog.text and not hanging.done()
    answer.set()
    assert hanging.result()


def test_a_store_that_hangs_holds_up_no_exit() -> None:
    script = (
        "import threading\n"
        "from lmcache_rag.vllm.saver import Saver\n"
        "saver = Saver()\n"
        "saver.submit(threading.Event().wait)\n"
        "saver.close(patience_s=0.01)\n"
        "print('left')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "left"), done.stderr
