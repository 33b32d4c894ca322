from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_helpers import (
    SPAWN,
    bytes_of_entries,
    contents,
    entry_files,
    entry_nbytes,
    kill,
    make_states,
    put_and_wait,
    run_as,
    same,
    spec_of,
)

from ape_integrations.errors import StoreError
from ape_integrations.store import (
    DiskKVStore,
    MemoryKVStore,
    TieredKVStore,
    recovery,
    serialization,
    usage,
)

SPEC = spec_of()
NOBODY = 65534
ENTRY = entry_nbytes("v1//auto/0", SPEC)


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[Path]:
    """Mount something at `path`; skip the test where that is not allowed."""
    path.mkdir(exist_ok=True)
    result = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting needs more rights: {result.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_full_disk_turns_storing_off_with_one_warning_until_there_is_room(tmp_path, caplog):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as mount:
        store = DiskKVStore(mount / "kv", "1GB", retry_after=0.05)
        large = make_states(2, tokens=4000)
        stored = [store.put(f"large-{number}", large) for number in range(8)]
        assert stored[0] and not stored[-1]
        time.sleep(0.06)
        assert not store.put("another", large)
        (warning,) = warnings_in(caplog)
        assert "off for now" in warning and str(store.directory) in warning
        assert same(store.get("large-0", large.spec), large), "reading goes on"
        assert store.stats().put_failures == stored.count(False) + 1
        store.delete("large-0")
        time.sleep(0.06)
        assert store.put("small", make_states(1))
        assert same(store.get("small", SPEC), make_states(1))
        assert store.verify().clean


def test_disk_filled_by_somebody_else_leaves_no_half_entries(tmp_path, caplog):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as mount:
        store = DiskKVStore(mount / "kv", retry_after=0.0)
        store.put("0", make_states(0))
        filler = mount / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert not store.put("1", make_states(1, tokens=2000))
        assert same(store.get("0", SPEC), make_states(0))
        store.flush()
        assert len(entry_files(store.directory)) == 1
        filler.unlink()
        assert store.put("1", make_states(1))
        assert store.verify().clean
        assert len(warnings_in(caplog)) == 1


def test_full_disk_during_a_write_leaves_no_file(tmp_path, monkeypatch, caplog):
    store = DiskKVStore(tmp_path / "kv")
    written = os.writev

    def half_then_full(descriptor, buffers):
        if os.fstat(descriptor).st_size:
            raise OSError(28, "No space left on device")
        return written(descriptor, [buffers[0][:100]])

    monkeypatch.setattr(os, "writev", half_then_full)
    assert not store.put("k", make_states())
    assert entry_files(store.directory) == [] and not store.contains("k")
    assert len(warnings_in(caplog)) == 1


def test_some_of_the_file_system_always_stays_free(tmp_path):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=128m", "tmpfs") as mount:
        store = DiskKVStore(mount / "kv", "1GB")
        with (mount / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 120 * 2**20)
        large = make_states(1, tokens=4000)
        while store.put(str(store.stats().entries), large):
            pass
        assert store.stats().entries > 2
        system = os.statvfs(mount)
        assert system.f_bavail * system.f_frsize > large.nbytes / 3


def test_directory_that_becomes_read_only_turns_storing_off(tmp_path, caplog):
    with mounted(tmp_path / "fs", "-t", "tmpfs", "tmpfs") as mount:
        store = DiskKVStore(mount / "kv", retry_after=0.0)
        store.put("0", make_states(0))
        with mounted(mount / "kv", "--bind", "-o", "ro", str(mount / "kv")):
            subprocess.run(
                ["mount", "-o", "remount,bind,ro", str(mount / "kv")], capture_output=True
            )
            for number in range(1, 4):
                assert not store.put(str(number), make_states(number))
            assert same(store.get("0", SPEC), make_states(0))
            assert store.get("1", SPEC) is None
            assert len(warnings_in(caplog)) == 1
        assert store.put("1", make_states(1))
        assert same(store.get("1", SPEC), make_states(1))


def test_store_on_a_read_only_mount_serves_and_warns_once(tmp_path, caplog):
    prepared = DiskKVStore(tmp_path / "kv")
    prepared.put("0", make_states(0), tag="llama")
    prepared.close()
    with mounted(tmp_path / "ro", "--bind", "-o", "ro", str(tmp_path / "kv")) as mount:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(mount)], capture_output=True)
        if os.access(mount, os.W_OK):
            pytest.skip("this system cannot mount read-only")
        store = DiskKVStore(mount)
        assert same(store.get("0", SPEC), make_states(0))
        for number in range(3):
            assert not store.put(str(number), make_states(number))
        with store.encoding_lock("7") as held, store.pin(["0"]):
            assert held == {"7"}
        assert store.stats().tags["llama"].entries == 1
        with pytest.raises(StoreError, match="read-only"):
            store.clear()
        (warning,) = warnings_in(caplog)
        assert "read-only" in warning
        with pytest.raises(StoreError, match="not writable"):
            (mount.parent / "ro2").mkdir()
            with mounted(
                mount.parent / "ro2", "-t", "tmpfs", "-o", "ro,mode=700", "tmpfs"
            ) as empty:
                DiskKVStore(empty)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], DiskKVStore]:
    """Return what opens a store as on a read-only mount."""

    def opened(directory: Path) -> DiskKVStore:
        with monkeypatch.context() as patch:
            patch.setattr(recovery, "is_writable", lambda _: False)
            return DiskKVStore(directory)

    return opened


def test_read_only_store_serves_what_a_killed_writer_left(tmp_path, read_only):
    ready = SPAWN.Event()
    process = SPAWN.Process(daemon=True, target=put_and_wait, args=(str(tmp_path), 20, ready))
    process.start()
    assert ready.wait(60)
    kill(process)
    before = contents(tmp_path)
    assert any(name.endswith("-wal") for name in before)
    store = read_only(tmp_path)
    assert all(same(store.get(str(n), SPEC), make_states(n)) for n in range(20))
    report = store.verify()
    assert report.clean and report.checked == 20 and not report.repaired
    store.close()
    assert contents(tmp_path) == before


def test_read_only_store_follows_writers_that_come_and_go(tmp_path, read_only, monkeypatch):
    with DiskKVStore(tmp_path) as writer:
        writer.put("0", make_states(0))
    store = read_only(tmp_path)
    for number in range(1, 4):
        # Reopening decides again whether the directory can be written to.
        with DiskKVStore(tmp_path) as writer, monkeypatch.context() as patch:
            writer.put(str(number), make_states(number))
            patch.setattr(recovery, "is_writable", lambda _: False)
            assert all(same(store.get(str(n), SPEC), make_states(n)) for n in range(number + 1))
    assert not store.put("9", make_states(9))


def test_nothing_can_be_removed_from_a_read_only_store(tmp_path, read_only):
    with DiskKVStore(tmp_path) as writer:
        writer.put("0", make_states(0))
    store = read_only(tmp_path)
    for remove in (store.clear, lambda: store.delete("0"), lambda: store.prune(older_than=0)):
        with pytest.raises(StoreError, match="read-only"):
            remove()
    assert same(store.get("0", SPEC), make_states(0))


def test_loads_do_not_try_again_and_again_to_write_down_uses(tmp_path, read_only, monkeypatch):
    with DiskKVStore(tmp_path) as writer:
        for number in range(40):
            writer.put(str(number), make_states(number))
    monkeypatch.setattr(usage, "MAX_PENDING", 5)
    store, attempts = read_only(tmp_path), []
    take = store._usage.take
    monkeypatch.setattr(store._usage, "take", lambda: attempts.append(1) or take())
    for number in range(40):
        assert store.get(str(number), SPEC) is not None
    assert 1 <= len(attempts) <= 8


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_no_memory_for_quantising_turns_storing_off(tmp_path, monkeypatch, caplog, error):
    store = DiskKVStore(tmp_path, kv_dtype="int8", retry_after=0.0)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "quantize", fail)
        for _ in range(3):
            assert not store.put("k", make_states())
    assert len(warnings_in(caplog)) == 1
    assert store.put("k", make_states())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_no_memory_for_reading_quantised_entries_is_a_miss(tmp_path, monkeypatch, error):
    store = DiskKVStore(tmp_path, kv_dtype="int8")
    store.put("k", make_states())

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "dequantize_into", fail)
        assert store.get("k", SPEC) is None
    assert store.get("k", SPEC) is not None, "the entry stays"


@pytest.mark.parametrize(
    "remove",
    [
        lambda store: store.delete("k"),
        lambda store: store.clear(),
        lambda store: store.prune(tag="*"),
        lambda store: store.prune(to_size=1),
    ],
)
def test_entries_that_cannot_be_removed_are_an_error(tmp_path, monkeypatch, remove):
    """Whoever removes private texts must know when they are still there."""
    monkeypatch.setattr("ape_integrations.store.index.BUSY_TIMEOUT", 0.05)
    store = DiskKVStore(tmp_path)
    store.put("k", make_states())
    store.close()
    store = DiskKVStore(tmp_path)
    with sqlite3.connect(tmp_path / "cache.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"could be removed.*locked"):
            remove(store)
        other.execute("ROLLBACK")
    assert store.contains("k")
    assert remove(store) and not store.contains("k")


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """Return a directory of a user without rights; root skips what permissions forbid."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "closed").mkdir(mode=0o755)
        (Path(name) / "own").mkdir()
        os.chown(Path(name) / "own", NOBODY, NOBODY)
        yield Path(name)


def as_nobody(scenario: Callable[[Path], object], directory: Path) -> None:
    """Run a test's body in a process of a user without rights."""
    errors = SPAWN.Queue()
    process = SPAWN.Process(daemon=True, target=run_as, args=(NOBODY, scenario, directory, errors))
    process.start()
    error = errors.get(timeout=60)
    process.join()
    assert error is None, error


def _open_without_permission(directory: Path) -> None:
    for path, message in ((directory, "is not writable"), (directory / "kv", "Cannot create")):
        with pytest.raises(StoreError, match=message) as caught:
            DiskKVStore(path, trust_directory=True)
        assert "DiskKVStore(directory=...)" in str(caught.value)


def test_directory_without_permission_is_a_clear_error(nobodys):
    as_nobody(_open_without_permission, nobodys / "closed")


def _lose_permission(directory: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    store = DiskKVStore(directory, retry_after=0.0)
    assert store.put("0", make_states(0))
    folders = [path for path, _, _ in os.walk(directory)]
    for path in folders:
        os.chmod(path, 0o500)
    # A few find the one folder that exists already, which is closed as well.
    assert not any(store.put(str(number), make_states(number)) for number in range(1, 40))
    assert same(store.get("0", SPEC), make_states(0))
    assert len(records) == 1
    for path in folders:
        os.chmod(path, 0o700)
    assert store.put("1", make_states(1))
    assert same(store.get("1", SPEC), make_states(1))


def test_permission_lost_later_turns_storing_off(nobodys):
    as_nobody(_lose_permission, nobodys / "own")


def test_unreadable_entry_is_a_miss_and_stays(tmp_path, monkeypatch, caplog):
    store = DiskKVStore(tmp_path / "kv")
    store.put("k", make_states(1))

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        for _ in range(3):
            assert store.get("k", SPEC) is None
    assert len(warnings_in(caplog)) == 1
    assert same(store.get("k", SPEC), make_states(1)), "a fault of the medium condemns no entry"


def test_clock_going_backwards_changes_neither_order_nor_entries(tmp_path, monkeypatch):
    store = DiskKVStore(tmp_path / "kv", 3 * ENTRY)
    now = 2_000_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    for number in range(3):
        store.put(str(number), make_states(number))
        store.get(str(number), SPEC)
    now = 1_000_000_000.0
    store.get("0", SPEC)
    store.put("3", make_states(3))
    store.get("3", SPEC)
    assert [key for key in "0123" if store.contains(key)] == ["0", "2", "3"]
    store.put("4", make_states(4))
    assert [key for key in "01234" if store.contains(key)] == ["0", "3", "4"]
    assert store.prune(older_than=60) == 0, "entries from the future are not old"
    assert same(store.get("0", SPEC), make_states(0))
    assert store.verify().clean


def test_two_format_versions_share_a_directory_without_harm(tmp_path, monkeypatch):
    old = DiskKVStore(tmp_path / "kv", 4 * ENTRY)
    old.put("k", make_states(1))
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "FORMAT_VERSION", serialization.FORMAT_VERSION + 1)
        new = DiskKVStore(tmp_path / "kv", 4 * ENTRY)
        assert new.get("k", SPEC) is None
        assert new.put("k", make_states(2))
        report = new.verify()
        assert report.clean and report.skipped == 1 and report.checked == 1
        assert same(new.get("k", SPEC), make_states(2))
    assert same(old.get("k", SPEC), make_states(1))
    assert old.verify().clean
    for number in range(8):
        old.put(str(number), make_states(number))
    assert bytes_of_entries(old.directory) <= 4 * ENTRY


def test_index_that_breaks_while_in_use_means_misses_and_heals_with_the_next_process(
    tmp_path, caplog
):
    store = DiskKVStore(tmp_path / "kv")
    for number in range(5):
        store.put(str(number), make_states(number))
    store.close()
    (tmp_path / "kv" / "cache.db").write_bytes(os.urandom(20_000))
    assert store.get("0", SPEC) is None
    assert not store.put("9", make_states(9))
    assert not store.contains("0")
    assert store.stats().entries == 0
    store.close()
    healed = DiskKVStore(tmp_path / "kv")
    assert all(same(healed.get(str(n), SPEC), make_states(n)) for n in range(5))


def test_directory_removed_under_a_running_store_means_misses(tmp_path, caplog):
    disk = DiskKVStore(tmp_path / "kv", retry_after=0.0)
    store = TieredKVStore(MemoryKVStore(4 * ENTRY), disk)
    store.put("0", make_states(0))
    store.flush()
    shutil.rmtree(tmp_path / "kv")
    assert disk.get("0", SPEC) is None
    assert same(store.get("0", SPEC), make_states(0)), "the memory tier goes on"
    store.put("1", make_states(1))
    store.flush()
    assert same(store.get("1", SPEC), make_states(1))
    assert len(warnings_in(caplog)) <= 3


def test_directory_made_again_under_a_running_store_is_the_new_store(tmp_path):
    directory, limit = tmp_path / "kv", 6 * ENTRY
    old = DiskKVStore(directory, limit)
    for number in range(4):
        old.put(str(number), make_states(number))
    shutil.rmtree(directory)
    new = DiskKVStore(directory, limit)
    assert old.get("0", SPEC) is None
    for number in range(4, 12):
        assert old.put(f"old-{number % 2}", make_states(number))
        assert new.put(f"new-{number % 2}", make_states(number))
    for key in ("old-1", "new-1"):
        assert same(old.get(key, SPEC), make_states(11))
        assert same(new.get(key, SPEC), make_states(11))
    assert bytes_of_entries(directory) == new.stats().bytes == old.stats().bytes <= limit
    assert new.verify().clean


def test_index_removed_under_a_running_store_is_rebuilt(tmp_path):
    store = DiskKVStore(tmp_path)
    for number in range(4):
        store.put(str(number), make_states(number))
    for path in tmp_path.glob("cache.db*"):
        path.unlink()
    assert all(same(store.get(str(n), SPEC), make_states(n)) for n in range(4))
    assert store.verify().clean and (tmp_path / "cache.db").exists()


def test_directory_made_again_by_somebody_else_is_not_used(tmp_path, caplog):
    store = DiskKVStore(tmp_path / "kv", retry_after=0.0)
    store.put("0", make_states(0))
    shutil.rmtree(tmp_path / "kv")
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(0o777)
    assert store.get("0", SPEC) is None
    assert not store.put("1", make_states(1))
    assert list((tmp_path / "kv").iterdir()) == []
    assert "trust_directory" in caplog.text
