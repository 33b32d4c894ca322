from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import diskcache
import pytest
import torch
from diskcache.core import MODE_PICKLE
from store_helpers import (
    KEYS,
    SPAWN,
    bytes_of_entries,
    entry_files,
    entry_nbytes,
    execute,
    hold_pin,
    kill,
    make_states,
    read_all,
    same,
    spec_of,
)

from ape_integrations.errors import ConfigError, StoreError
from ape_integrations.store import DiskKVStore, maintenance, open_store, recovery
from ape_integrations.store.files import EntryFiles
from ape_integrations.store.index import EntryDisk

SPEC = spec_of()
ENTRY = entry_nbytes("v2//auto/0", SPEC)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def test_a_new_process_finds_what_the_old_one_stored(directory):
    store = DiskKVStore(directory)
    for number in range(3):
        store.put(KEYS[number], make_states(number))
    results = SPAWN.Queue()
    process = SPAWN.Process(
        daemon=True, target=read_all, args=(str(directory), [0, 1, 2, 3], results)
    )
    process.start()
    assert results.get(timeout=60) == [True, True, True, False]
    process.join()


def test_default_directory_is_the_users_cache_and_private(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    store = DiskKVStore()
    store.put("k", make_states())
    assert tmp_path in store.directory.parents
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    (file,) = entry_files(store.directory)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_least_recently_used_goes_first(directory):
    store = DiskKVStore(directory, 4 * ENTRY)
    for number in range(4):
        store.put(KEYS[number], make_states(number))
    for number in (0, 1, 2, 3, 0, 2):
        store.get(KEYS[number], SPEC)
    store.put("4", make_states(4))
    store.get("4", SPEC)
    store.put("5", make_states(5))
    assert [key for key in "012345" if store.contains(key)] == ["0", "2", "4", "5"]
    assert store.stats().evictions == 2


def test_limit_holds_exactly(directory):
    store = DiskKVStore(directory, 5 * ENTRY + 1)
    for number in range(30):
        assert store.put(KEYS[number], make_states(number))
        assert bytes_of_entries(directory) == store.stats().bytes <= 5 * ENTRY + 1
    assert store.stats().entries == 5


def test_opening_an_empty_store_leaves_its_index_alone(directory):
    DiskKVStore(directory)
    inode = (directory / "cache.db").stat().st_ino
    DiskKVStore(directory)
    assert (directory / "cache.db").stat().st_ino == inode
    assert not (directory / "rebuild").exists()


def test_limit_of_a_reopened_store_is_the_new_one(directory):
    DiskKVStore(directory, 10 * ENTRY).close()
    store = DiskKVStore(directory, 10 * ENTRY)
    for number in range(10):
        store.put(KEYS[number], make_states(number))
    smaller = DiskKVStore(directory, 3 * ENTRY)
    smaller.put("a", make_states(10))
    assert bytes_of_entries(directory) <= 3 * ENTRY
    assert smaller.contains("a")


def test_entry_larger_than_the_limit_is_not_stored_and_evicts_nothing(directory):
    store = DiskKVStore(directory, 2 * ENTRY)
    store.put("small", make_states())
    assert not store.put("large", make_states(tokens=60))
    assert store.contains("small")
    assert store.stats().put_failures == 1
    assert store.put("small2", make_states())


def test_pinned_entries_are_not_evicted(directory):
    store = DiskKVStore(directory, 3 * ENTRY)
    store.put("0", make_states(0))
    with store.pin(["0", "L"]):
        store.put("L", make_states(7))
        for number in range(1, 10):
            assert store.put(KEYS[number], make_states(number))
        assert same(store.get("0", SPEC), make_states(0))
        assert same(store.get("L", SPEC), make_states(7))
        with store.pin(["9"]):
            assert not store.put("a", make_states(10)), "pinned entries leave no room"
        assert store.stats().bytes <= 3 * ENTRY
    for number in range(10, 30):
        store.put(KEYS[number], make_states(number))
        store.get(KEYS[number], SPEC)
    assert not store.contains("0")


def test_put_in_vain_beside_pinned_entries_changes_nothing(directory):
    store = DiskKVStore(directory, 8 * ENTRY)
    for number in range(8):
        store.put(KEYS[number], make_states(number))
    large = make_states(9, tokens=36)
    with store.pin(KEYS[:4]):
        assert ENTRY * 4 < entry_nbytes("v2//auto/0", large.spec) < ENTRY * 8
        for key in ("a", "7"):
            assert not store.put(key, large)
            assert all(same(store.get(KEYS[n], SPEC), make_states(n)) for n in range(8))
    assert store.stats().evictions == 0
    assert store.put("7", large)


def test_pins_hold_within_the_process_without_locked_files(directory, monkeypatch):
    monkeypatch.setattr("ape_integrations.store.pins.MAX_LOCKED_FILES", 0)
    store = DiskKVStore(directory, 2 * ENTRY)
    store.put("0", make_states(0))
    with store.pin(["0"]):
        for number in range(1, 6):
            assert store.put(KEYS[number], make_states(number))
        assert store.contains("0")


def test_pins_hold_in_other_processes_and_die_with_their_holder(directory):
    limit = 2 * ENTRY
    store = DiskKVStore(directory, limit)
    store.put("pinned", make_states(1))
    ready, done = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(
        daemon=True, target=hold_pin, args=(str(directory), limit, "pinned", ready, done)
    )
    process.start()
    assert ready.wait(60)
    for number in range(5):
        store.put(KEYS[number], make_states(number))
    assert same(store.get("pinned", SPEC), make_states(1))
    kill(process)
    for number in range(5):
        store.put(KEYS[number], make_states(number))
        store.get(KEYS[number], SPEC)
    assert not store.contains("pinned")


def test_namespaces_never_share(directory):
    a = DiskKVStore(directory, namespace="tenant-a")
    b = DiskKVStore(directory, namespace="tenant-b")
    a.put("k", make_states(1))
    assert not b.contains("k") and b.get("k", SPEC) is None
    b.put("k", make_states(2))
    assert same(a.get("k", SPEC), make_states(1))
    assert b.clear() == 1
    assert same(a.get("k", SPEC), make_states(1))


def test_namespaces_share_one_limit(directory):
    stores = [DiskKVStore(directory, 3 * ENTRY, namespace=f"n{i}") for i in range(4)]
    for number in range(8):
        stores[number % 4].put(KEYS[number], make_states(number))
    assert bytes_of_entries(directory) <= 3 * ENTRY


@pytest.mark.parametrize(
    "setting", [{"namespace": "a/b"}, {"kv_dtype": "int4"}, {"size_limit": "x"}]
)
def test_bad_settings_are_clear_errors_and_leave_nothing(directory, setting):
    with pytest.raises(ConfigError):
        DiskKVStore(directory, **setting)
    assert not directory.exists()


def test_keys_that_could_be_text_are_refused(directory):
    store = DiskKVStore(directory)
    for key in ("two words", "a/b", "", "x" * 300, "line\n"):
        with pytest.raises(ConfigError):
            store.contains(key)


def test_quantised_entries_are_not_served_to_readers_of_exact_ones(directory):
    rounded = DiskKVStore(directory, kv_dtype="int8")
    exact = DiskKVStore(directory)
    rounded.put("k", make_states(1))
    assert exact.get("k", SPEC) is None
    exact.put("k", make_states(1))
    assert same(exact.get("k", SPEC), make_states(1))
    assert not same(rounded.get("k", SPEC), make_states(1))


def test_figures_outlive_the_process(directory):
    store = DiskKVStore(directory)
    store.put("a", make_states(1), tag="llama")
    store.put("b", make_states(2), tag="qwen")
    store.get("a", SPEC)
    store.get("a", SPEC)
    store.get("c", SPEC)
    store.close()
    stats = DiskKVStore(directory).stats()
    assert (stats.hits, stats.misses, stats.entries) == (2, 1, 2)
    assert stats.hit_rate == pytest.approx(2 / 3)
    assert stats.tags["llama"].hits == 2 and stats.tags["qwen"].hits == 0
    assert stats.tags["llama"].bytes == ENTRY
    assert stats.oldest is not None and stats.oldest <= stats.newest


def test_entry_replaced_while_it_is_looked_up_is_a_hit(directory, monkeypatch):
    store, other = DiskKVStore(directory), DiskKVStore(directory)
    store.put("k", make_states(1))
    find = store._index.find

    def find_then_replace(key):
        row = find(key)
        monkeypatch.setattr(store._index, "find", find)
        other.put("k", make_states(2))
        return row

    monkeypatch.setattr(store._index, "find", find_then_replace)
    assert same(store.get("k", SPEC), make_states(2))
    assert store.stats().corrupted == 0


def test_prune_by_age_tag_and_size(directory):
    store = DiskKVStore(directory)
    for number in range(6):
        store.put(KEYS[number], make_states(number), tag="llama-8b" if number < 3 else "qwen-7b")
    execute(directory, "UPDATE Cache SET access_time = access_time - 1000 WHERE key LIKE '%/5'")
    assert store.prune(older_than=3600) == 0
    assert store.prune(older_than=500) == 1 and not store.contains("5")
    assert store.prune(tag="llama*") == 3
    assert store.prune(to_size=ENTRY) == 1
    assert store.stats().entries == 1


def test_row_that_claims_to_be_a_pickle_is_never_unpickled(directory, tmp_path):
    store = DiskKVStore(directory)
    witness = tmp_path / "witness"
    payload = f"cos\nsystem\n(S'touch {witness}'\ntR.".encode()
    for key in ("file", "inline"):
        store.put(key, make_states())
    (file, _) = entry_files(directory)
    file.write_bytes(payload)
    execute(directory, "UPDATE Cache SET mode = ? WHERE key LIKE '%/file'", MODE_PICKLE)
    execute(
        directory,
        "UPDATE Cache SET mode = ?, filename = NULL, value = ? WHERE key LIKE '%/inline'",
        MODE_PICKLE,
        payload,
    )
    store = DiskKVStore(directory)
    for key in ("file", "inline"):
        assert store.get(key, SPEC) is None
        assert not store.contains(key), "a bad row is dropped"
    assert store.stats().corrupted == 2
    assert not witness.exists()


def test_the_disk_class_refuses_pickles_on_every_path(directory):
    cache = diskcache.Cache(str(directory), disk=EntryDisk)
    with pytest.raises(TypeError):
        cache["k"] = {"a": 1}
    with pytest.raises(TypeError):
        cache[("tuple",)] = b"bytes"
    execute(
        directory,
        "INSERT INTO Cache (key, raw, mode, value) VALUES ('k', 1, ?, ?)",
        MODE_PICKLE,
        b"cos\nabort\n(tR.",
    )
    execute(directory, "INSERT INTO Cache (key, raw) VALUES (?, 0)", b"cos\nabort\n(tR.")
    assert cache.get("k") is None
    with pytest.raises(TypeError):
        list(cache)


def test_paths_outside_the_store_are_neither_read_nor_removed(directory, tmp_path):
    store = DiskKVStore(directory)
    outside = tmp_path / "outside.kv"
    for number, name in enumerate(["../outside.kv", str(outside), "entries/../../outside.kv"]):
        store.put(KEYS[number], make_states(number))
        (target,) = [f for f in entry_files(directory)]
        outside.write_bytes(target.read_bytes())
        execute(directory, "UPDATE Cache SET filename = ?", name)
        assert store.get(KEYS[number], SPEC) is None
        assert outside.exists()
        target.unlink()
        store.verify()
        store.clear()
        assert outside.exists()


@pytest.mark.parametrize(
    "name", ["cache.db", "../x.kv", "/etc/passwd", "entries/ab/../../x.kv", "entries/ab/x.kv", ""]
)
def test_files_that_are_not_entries_cannot_even_be_named(directory, name):
    files = EntryFiles(directory)
    for use in (files.open, files.remove, files.remove_unused, files.is_used, files.pin):
        with pytest.raises(ValueError, match="not an entry file"):
            use(name)


def test_symbolic_links_are_not_followed(directory, tmp_path):
    store = DiskKVStore(directory)
    store.put("k", make_states(1))
    (file,) = entry_files(directory)
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert store.get("k", SPEC) is None
    assert elsewhere.exists()


def test_folders_that_are_symbolic_links_are_not_followed(directory, tmp_path):
    store = DiskKVStore(directory)
    store.put("k", make_states(1))
    (file,) = entry_files(directory)
    elsewhere = tmp_path / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)
    store = DiskKVStore(directory)
    assert store.get("k", SPEC) is None
    assert store.verify(repair=False).orphans == ()
    assert store.delete("k") and not store.contains("k")
    assert (elsewhere / file.name).exists(), "nothing is removed there either"


def test_nothing_of_the_text_is_stored_in_clear(directory):
    store = DiskKVStore(directory)
    text = "The patient's name is Eleanor Rigby."
    import hashlib

    key = hashlib.sha256(text.encode()).hexdigest()
    store.put(key, make_states(), tag="llama")
    with store.encoding_lock(key):
        store.close()
        for path in directory.rglob("*"):
            if path.is_file():
                assert b"Eleanor" not in path.read_bytes()
                assert "Eleanor" not in path.name


def test_another_users_directory_is_refused_unless_trusted(directory):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to somebody else")
    DiskKVStore(directory).close()
    for item in (directory, directory / "cache.db", directory / "entries"):
        item.mkdir(exist_ok=True) if item.suffix == "" else None
        os.chown(item, 12345, -1)
        with pytest.raises(StoreError, match="trust_directory"):
            DiskKVStore(directory)
        assert DiskKVStore(directory, trust_directory=True).put("k", make_states())
        os.chown(item, 0, -1)


def test_what_is_stored_is_private_whatever_the_umask(directory):
    old = os.umask(0)
    try:
        directory.mkdir(mode=0o755)
        store = DiskKVStore(directory)
        store.put("k", make_states(1))
        with store.encoding_lock("k"):
            private = list(directory.rglob("*"))
            assert len(private) >= 5
            assert [p for p in private if stat.S_IMODE(p.stat().st_mode) & 0o022] == []
            assert stat.S_IMODE((directory / "entries").stat().st_mode) == 0o700
        assert same(DiskKVStore(directory).get("k", SPEC), make_states(1))
    finally:
        os.umask(old)


def test_trusted_directory_is_shared_as_its_mode_says(directory):
    directory.mkdir()
    directory.chmod(0o775)
    store = DiskKVStore(directory, trust_directory=True)
    store.put("k", make_states(1))
    (file,) = entry_files(directory)
    assert stat.S_IMODE(file.stat().st_mode) == 0o664
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o775
    assert stat.S_IMODE((directory / "cache.db").stat().st_mode) == 0o664


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_directory_that_others_can_write_to_is_refused_unless_trusted(directory, mode):
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StoreError, match="chmod go-w"):
        DiskKVStore(directory)
    DiskKVStore(directory, trust_directory=True).close()


def test_cache_of_another_application_is_refused_and_left_alone(directory):
    directory.mkdir()
    other = diskcache.Cache(str(directory))
    other["precious"] = [1, 2, 3]
    before = execute(directory, "SELECT * FROM Settings ORDER BY key")
    with pytest.raises(StoreError, match="another application"):
        DiskKVStore(directory)
    assert other["precious"] == [1, 2, 3]
    assert execute(directory, "SELECT * FROM Settings ORDER BY key") == before


def test_directory_below_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Give another one"):
        DiskKVStore(tmp_path / "file" / "kv")
    with pytest.raises(StoreError):
        DiskKVStore(tmp_path / "file")


def test_open_store_takes_a_store_or_a_path(directory):
    store = DiskKVStore(directory)
    assert open_store(store) is store
    with open_store(str(directory)) as opened:
        opened.put("k", make_states(1))
    assert same(store.get("k", SPEC), make_states(1))


def test_files_of_writers_at_work_are_not_taken_for_abandoned(directory):
    store = DiskKVStore(directory)
    with EntryFiles(directory).create() as file:
        report = store.verify()
        assert report.clean and (directory / file.name).exists()
        DiskKVStore(directory)
        assert (directory / file.name).exists()
    assert not (directory / file.name).exists()


def test_verify_finds_and_repairs_everything(directory):
    store = DiskKVStore(directory)
    for number in range(6):
        store.put(KEYS[number], make_states(number))
    names = dict(execute(directory, "SELECT key, filename FROM Cache"))
    paths = [directory / names[f"v2//auto/{number}"] for number in range(6)]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    damaged = bytearray(paths[2].read_bytes())
    damaged[-1] ^= 1
    paths[2].write_bytes(damaged)
    paths[3].write_bytes(paths[4].read_bytes())
    orphan = paths[4].with_name("0" * 30 + ".kv")
    orphan.write_bytes(paths[4].read_bytes())
    execute(directory, "UPDATE Settings SET value = 999 WHERE key IN ('size', 'count')")
    execute(directory, "DELETE FROM KVUsage WHERE key LIKE '%/5'")

    found = store.verify(repair=False)
    assert not found.clean and not found.repaired
    assert orphan.exists() and store.stats().entries == 6
    report = store.verify()
    assert report.checked == 2
    assert report.missing == ("v2//auto/0",)
    assert sorted(report.corrupted) == ["v2//auto/1", "v2//auto/2", "v2//auto/3"]
    assert len(report.orphans) == 1 and not orphan.exists()
    assert len(report.index_errors) == 3
    assert store.verify().clean
    assert store.stats().entries == 2 and store.stats().bytes == 2 * ENTRY
    assert same(store.get("5", SPEC), make_states(5))


DAMAGES = "garbage", "empty table", "no table", "torn page", "truncated", "empty", "log", "missing"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_rebuilt_from_the_entries(directory, damage, caplog):
    store = DiskKVStore(directory)
    for number in range(20):
        store.put(KEYS[number], make_states(number))
    store.close()
    database = directory / "cache.db"
    execute(directory, "PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(database.read_bytes())
    if damage == "garbage":
        database.write_bytes(b"not a database" * 100)
    elif damage == "empty table":
        execute(directory, "DROP TABLE Settings")
        execute(directory, "CREATE TABLE Settings (x)")
    elif damage == "no table":
        execute(directory, "DROP TABLE Cache")
    elif damage == "empty":
        database.write_bytes(b"")
    elif damage == "log":
        database.rename(directory / "cache.db-wal")
    elif damage == "missing":
        database.unlink()
    elif damage == "torn page":
        content[4096 * 2 : 4096 * 4] = os.urandom(8192)
        database.write_bytes(content)
    else:
        database.write_bytes(content[: 4096 * 3])
    store = DiskKVStore(directory)
    assert all(same(store.get(KEYS[n], SPEC), make_states(n)) for n in range(20))
    assert store.verify().clean
    assert sum("damaged" in record.message for record in caplog.records) == 1


def _filled_and_damaged(directory: Path) -> None:
    with DiskKVStore(directory) as store:
        for number in range(20):
            store.put(KEYS[number], make_states(number))
    (directory / "cache.db").write_bytes(b"not a database" * 100)


def test_who_opens_a_store_during_a_rebuild_removes_nothing(directory, monkeypatch):
    _filled_and_damaged(directory)
    adopt, opened = recovery.adopt_files, []
    other = threading.Thread(target=lambda: opened.append(DiskKVStore(directory)))

    def adopt_beside_another_opener(index, files):
        monkeypatch.setattr(recovery, "adopt_files", adopt)
        other.start()
        other.join(1)
        return adopt(index, files)

    monkeypatch.setattr(recovery, "adopt_files", adopt_beside_another_opener)
    store = DiskKVStore(directory)
    other.join(60)
    for each in (store, *opened):
        assert all(same(each.get(KEYS[n], SPEC), make_states(n)) for n in range(20))
    assert len(opened) == 1 and store.verify().clean


@pytest.mark.parametrize("moment", ["adopting", "moving"])
def test_rebuild_that_is_interrupted_is_begun_anew(directory, monkeypatch, moment):
    _filled_and_damaged(directory)
    read, left = maintenance.read_key, iter(range(10))

    def read_ten(source):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(source)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "adopting":
            patch.setattr(maintenance, "read_key", read_ten)
        else:
            patch.setattr(Path, "rename", die)
        DiskKVStore(directory)
    store = DiskKVStore(directory)
    assert all(same(store.get(KEYS[n], SPEC), make_states(n)) for n in range(20))
    assert store.verify().clean


def test_opening_says_what_it_mended(directory):
    _filled_and_damaged(directory)
    orphan = entry_files(directory)[0].with_name("0" * 30 + ".kv")
    orphan.write_bytes(b"half")
    store = DiskKVStore(directory)
    assert store.mended.orphans == (str(orphan.relative_to(directory)),)
    assert len(store.mended.index_errors) == 1 and not store.mended.clean
    assert DiskKVStore(directory).mended.clean


def test_too_large_entries_are_one_warning(directory, caplog):
    store = DiskKVStore(directory, ENTRY)
    for number in range(5):
        assert not store.put(KEYS[number], make_states(number, tokens=60))
    assert sum("exceeds the limit" in record.message for record in caplog.records) == 1


def test_a_store_in_bfloat16_returns_bfloat16_bit_for_bit(directory):
    store = DiskKVStore(directory)
    states = make_states(3, dtype=torch.bfloat16)
    store.put("k", states)
    assert same(store.get("k", states.spec), states)
    assert store.get("k", SPEC) is None, "another dtype is a miss"


def test_place_in_the_order_of_eviction_without_an_entry_is_passed_over(directory):
    """Other versions, or a repair that was interrupted, may leave such a thing."""
    store = DiskKVStore(directory)
    store.put("0", make_states(0))
    store.put("1", make_states(1))
    execute(directory, "INSERT INTO KVUsage VALUES ('v1//auto/gone', 0, 0, 9)")
    assert store.prune(to_size=store.stats().bytes - 1) == 1
    assert [store.contains(key) for key in "01"] == [False, True]
