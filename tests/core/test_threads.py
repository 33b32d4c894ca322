"""Executor threads come and go with the work."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from ape_integrations.core.threads import PassingExecutor, _pause_function, release_openmp_team


def _alive(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def _wait_until(condition: object) -> bool:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def test_results_and_errors_arrive_in_order():
    executor = PassingExecutor(2, "t-order")
    assert list(executor.map(lambda n: n * n, range(20))) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        executor.submit(lambda: 1 / 0).result(timeout=30)
    assert executor.submit(int, "7", base=8).result(timeout=30) == 7


def test_threads_are_bounded_and_end_when_idle():
    executor = PassingExecutor(2, "t-bound")
    release, seen = threading.Event(), []

    def work() -> None:
        seen.append(_alive("t-bound"))
        release.wait(30)

    futures = [executor.submit(work) for _ in range(6)]
    assert _wait_until(lambda: len(seen) == 2)
    release.set()
    for future in futures:
        future.result(timeout=30)
    assert max(seen) <= 2
    assert _wait_until(lambda: _alive("t-bound") == 0)


def test_one_worker_runs_in_the_order_of_submission():
    executor, seen = PassingExecutor(1, "t-one"), []
    for number in range(50):
        executor.submit(seen.append, number)
    executor.shutdown()
    assert seen == list(range(50))


def test_shutdown_takes_no_more_work_and_can_cancel():
    executor, release = PassingExecutor(1, "t-shut"), threading.Event()
    running = executor.submit(release.wait, 30)
    waiting = executor.submit(lambda: "never")
    assert _wait_until(running.running)
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(timeout=30)
    with pytest.raises(RuntimeError):
        executor.submit(print)
    release.set()
    assert running.result(timeout=30)


def test_cancelled_work_is_skipped():
    executor, release = PassingExecutor(1, "t-cancel"), threading.Event()
    executor.submit(release.wait, 30)
    skipped, last = executor.submit(lambda: "no"), executor.submit(lambda: "yes")
    assert skipped.cancel()
    release.set()
    assert last.result(timeout=30) == "yes"


def test_a_thread_that_cannot_start_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    start, executor, ran = threading.Thread.start, PassingExecutor(2, "t-none"), []

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    for number in range(3):
        with pytest.raises(RuntimeError, match="can't start"):
            executor.submit(ran.append, number)
    monkeypatch.setattr(threading.Thread, "start", start)
    executor.submit(ran.append, "later").result(timeout=30)
    assert ran == ["later"]
    executor.submit(ran.append, "last")
    executor.shutdown()
    assert ran == ["later", "last"]


def test_threads_that_are_alive_work_for_those_that_cannot_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, executor, release = (
        threading.Thread.start,
        PassingExecutor(2, "t-few"),
        threading.Event(),
    )
    first = executor.submit(release.wait, 30)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    second = executor.submit(lambda: "done")
    monkeypatch.setattr(threading.Thread, "start", start)
    release.set()
    assert first.result(timeout=30)
    assert second.result(timeout=30) == "done"
    executor.shutdown()


@pytest.mark.skipif(_pause_function() is None, reason="torch runs on another OpenMP")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads cannot be counted")
def test_released_team_is_gone_and_comes_back():
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def work() -> None:
        before = threads()
        expected = big.exp()
        assert threads() == before + 1, "a team of two"
        release_openmp_team()
        assert _wait_until(lambda: threads() == before)
        assert torch.equal(big.exp(), expected)
        assert threads() == before + 1
        release_openmp_team()

    big, count = torch.rand(1_000_000), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        release_openmp_team()
        executor = PassingExecutor(1, "t-team")
        executor.submit(work).result(timeout=60)
    finally:
        torch.set_num_threads(count)
