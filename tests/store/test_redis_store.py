"""Against a real server on this machine; skipped where there is none."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from store_helpers import entry_nbytes, make_states, same, spec_of

from ape_integrations.errors import ConfigError, StoreError
from ape_integrations.store import DiskKVStore, MemoryKVStore, RedisKVStore, TieredKVStore
from ape_integrations.store import redis as redis_module
from tests.redis_server import Server

pytest.importorskip("redis", reason="redis-py is not installed")

SPEC = spec_of()
ENTRY = entry_nbytes("v1//auto/0", SPEC)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(running: Server) -> Server:
    if running.process is None:
        running.start()
    running.client().flushall()
    return running


def test_entries_are_shared_and_come_back_bit_for_bit(server):
    a, b = RedisKVStore(server.url), RedisKVStore(server.url)
    assert a.put("k", make_states(1), tag="llama")
    assert b.contains("k")
    assert same(b.get("k", SPEC), make_states(1))
    assert b.peek("k", SPEC)[1] == "llama"
    assert b.get("absent", SPEC) is None
    assert b.get("k", spec_of(tokens=7)) is None
    assert (b.stats().hits, b.stats().misses, b.stats().corrupted) == (1, 2, 1)


def test_large_entries_are_stored_in_chunks(server, monkeypatch):
    monkeypatch.setattr(redis_module, "CHUNK_BYTES", 1000)
    store = RedisKVStore(server.url)
    states = make_states(1, tokens=100)
    assert store.put("k", states)
    assert same(store.get("k", states.spec), states)
    sizes = [server.client().strlen(key) for key in server.client().keys("ape:chunk:*")]
    assert len(sizes) > 10 and max(sizes) == 1000
    assert store.delete("k") and not store.delete("k")
    assert not server.client().keys("ape:chunk:*")


def test_limit_holds_and_least_recently_used_goes_first(server):
    store = RedisKVStore(server.url, max_bytes=3 * ENTRY)
    for key in "abc":
        store.put(key, make_states())
    store.get("a", SPEC)
    store.put("d", make_states())
    assert [key for key in "abcd" if store.contains(key)] == ["a", "c", "d"]
    assert store.stats().bytes == 3 * ENTRY and store.stats().evictions == 1
    assert not store.put("e", make_states(tokens=100))
    with store.pin("acd"):
        assert not store.put("f", make_states())
    with store.pin("ac"):
        assert store.put("f", make_states())
    assert not store.contains("d")


def test_entries_expire_and_are_accounted_for(server):
    store, client = RedisKVStore(server.url, ttl=60), server.client()
    store.put("k", make_states(1))
    assert store.contains("k")
    for key in (*client.keys("ape:chunk:*"), *client.keys("ape:entry:*")):
        assert 0 < client.pttl(key) <= 60_000
        client.pexpire(key, 1)
    time.sleep(0.05)
    assert not store.contains("k") and store.get("k", SPEC) is None
    assert store.stats().entries == store.stats().bytes == 0
    assert not server.client().keys("ape:chunk:*")


def test_replaced_entries_leave_nothing_behind(server):
    store = RedisKVStore(server.url)
    for number in range(5):
        store.put("k", make_states(number))
    assert same(store.get("k", SPEC), make_states(4))
    assert len(server.client().keys("ape:chunk:*")) == 1
    assert store.stats().bytes == ENTRY


def test_namespaces_never_share(server):
    a = RedisKVStore(server.url, namespace="a")
    b = RedisKVStore(server.url, namespace="b")
    a.put("k", make_states(1))
    assert not b.contains("k")
    assert b.clear() == 0 and a.contains("k")
    assert a.clear() == 1 and not a.contains("k")


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3"])
def test_entries_can_be_quantised(server, kv_dtype):
    store = RedisKVStore(server.url, kv_dtype=kv_dtype)
    store.put("k", make_states(1))
    found = store.get("k", SPEC)
    assert (found.keys[0] - make_states(1).keys[0]).abs().max() < 0.2
    assert RedisKVStore(server.url).get("k", SPEC) is None


@pytest.mark.parametrize("damage", ["flip", "short", "gone", "text", "meta"])
def test_damaged_entries_are_misses_and_dropped(server, damage):
    store, client = RedisKVStore(server.url), server.client()
    store.put("k", make_states(1))
    (chunk,) = client.keys("ape:chunk:*")
    (entry,) = client.keys("ape:entry:*")
    if damage == "flip":
        client.setrange(chunk, ENTRY - 5, b"\x55\xaa\x55")
    elif damage == "short":
        client.set(chunk, client.get(chunk)[:-1])
    elif damage == "gone":
        client.delete(chunk)
    elif damage == "text":
        client.set(chunk, "x" * ENTRY)
    else:
        client.hset(entry, "size", "many")
    assert store.get("k", SPEC) is None
    assert not store.contains("k")
    assert store.stats().corrupted == 1


def test_server_that_is_down_means_misses_with_one_warning(server, caplog):
    store = RedisKVStore(server.url, retry_after=0.05)
    store.put("k", make_states(1))
    server.kill()
    for _ in range(3):
        assert store.get("k", SPEC) is None
        assert not store.contains("k")
        assert not store.put("k2", make_states(2))
        time.sleep(0.06)
    assert store.stats().entries == 0
    for remove in (lambda: store.delete("k"), store.clear):
        with pytest.raises(StoreError, match="Nothing was removed"):
            remove()
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    server.start()
    time.sleep(0.06)
    assert store.put("k", make_states(1)), "it is found again by itself"
    assert same(store.get("k", SPEC), make_states(1))


def test_server_that_never_existed_is_no_error():
    store = RedisKVStore("redis://127.0.0.1:1/0", timeout=0.2)
    assert store.get("k", SPEC) is None
    assert not store.put("k", make_states())


def test_server_that_does_not_answer_is_not_asked_again_at_once():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        store = RedisKVStore(url, timeout=0.1, retry_after=60)
        for _ in range(20):
            assert store.get("k", SPEC) is None
        silent.setblocking(False)
        connections = [silent.accept()[0]]
        with pytest.raises(BlockingIOError):
            silent.accept()
        connections[0].close()


def test_server_killed_and_restarted_under_load_gives_no_wrong_bytes(server):
    store = RedisKVStore(server.url, retry_after=0.01, timeout=0.5)
    tiered = TieredKVStore(MemoryKVStore(2 * ENTRY), store)
    wrong: list[str] = []
    end = time.monotonic() + 1.5

    def work(seed: int) -> None:
        step = 0
        while time.monotonic() < end:
            step += 1
            number = (seed * 5 + step) % 7
            try:
                found = tiered.get(str(number), SPEC)
                if found is None:
                    tiered.put(str(number), make_states(number))
                elif not same(found, make_states(number)):
                    wrong.append(f"bytes of {number}")
            except BaseException as error:
                wrong.append(repr(error))
                raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(0.3)
        server.kill()
        time.sleep(0.1)
        server.start()
    for thread in threads:
        thread.join()
    tiered.flush()
    assert not wrong


def test_three_tiers_read_through_and_write_back(server, tmp_path):
    def machine(name: str) -> TieredKVStore:
        return TieredKVStore(
            MemoryKVStore("1MB"), DiskKVStore(tmp_path / name), RedisKVStore(server.url)
        )

    first, second = machine("one"), machine("two")
    first.put("k", make_states(1), tag="llama")
    first.flush()
    assert same(second.get("k", SPEC), make_states(1))
    second.flush()
    server.kill()
    assert same(second.tiers[1].get("k", SPEC), make_states(1)), "it reached the other disk"
    assert second.tiers[1].stats().tags["llama"].entries == 1
    assert same(second.get("k", SPEC), make_states(1))


@pytest.mark.parametrize(
    "setting",
    [{"ttl": 0}, {"max_bytes": "lots"}, {"namespace": "a b"}, {"kv_dtype": "int2"}, {"url": "x"}],
)
def test_bad_settings_are_clear_errors(setting):
    with pytest.raises(ConfigError):
        RedisKVStore(**{"url": "redis://127.0.0.1:1/0", **setting})


def test_password_is_not_shown():
    assert "secret" not in repr(RedisKVStore("redis://:secret@127.0.0.1:1/0"))
