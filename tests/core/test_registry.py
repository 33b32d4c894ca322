"""Registry: what is registered is found, and only within bounds."""

from __future__ import annotations

import json
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ape_integrations.core.registry import ContextRegistry, TextIndex


def anywhere(start: int, end: int) -> bool:
    return True


def found(registry: ContextRegistry, prompt: str) -> list[str]:
    return [prompt[a:b] for a, b in registry.find(prompt, range(len(prompt)), anywhere)]


def test_edge_whitespace_does_not_matter() -> None:
    registry = ContextRegistry()
    registry.register(["  A heron wades.\n\n"])
    assert found(registry, "A heron wades.") == ["A heron wades."]


def test_blank_texts_and_queries_are_ignored() -> None:
    registry = ContextRegistry()
    registry.register(["", " \n\t "], query="  ")
    assert (len(registry), registry.queries()) == (0, ())


def test_same_text_counts_once() -> None:
    registry = ContextRegistry()
    registry.register(["a heron", "a heron ", "a heron"])
    assert len(registry) == 1


def test_longest_text_at_the_leftmost_position_wins() -> None:
    registry = ContextRegistry()
    registry.register(
        ["heron", "heron nests in colonies", "heron nests", "nests in colonies of many"]
    )
    assert found(registry, "a heron nests in colonies of many") == ["heron nests in colonies"]


def test_refused_text_gives_way_to_a_shorter_one() -> None:
    registry = ContextRegistry()
    registry.register(["heron", "heron nests in colonies"])
    prompt = "heron nests in colonies"
    assert registry.find(prompt, [0], lambda start, end: end - start < 10) == [(0, 5)]


def test_least_recently_registered_texts_leave_first() -> None:
    registry = ContextRegistry(max_texts=2)
    registry.register(["first text"])
    registry.register(["second text"])
    registry.register(["first text"])
    registry.register(["third text"])
    assert found(registry, "first text, second text, third text") == ["first text", "third text"]


def test_recent_queries_are_kept_in_order_and_bounded() -> None:
    registry = ContextRegistry(max_queries=2)
    for query in ["one", "two", "one ", "three"]:
        registry.register([], query=query)
    assert registry.queries() == ("one", "three")


def test_cleared_registry_finds_nothing() -> None:
    registry = ContextRegistry()
    registry.register(["a heron"], query="what?")
    registry.clear()
    assert (len(registry), registry.queries(), found(registry, "a heron")) == (0, (), [])


TEXT = 'Herons & "egrets" don\'t <swim>;\nthey wade\tin wörter.'


@pytest.mark.parametrize(
    "written",
    [
        TEXT,
        TEXT.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;"),
        json.dumps(TEXT)[1:-1],
        json.dumps(TEXT, ensure_ascii=False)[1:-1],
        repr([TEXT])[2:-2],
        repr([TEXT.replace('"', "")])[2:-2],
        repr(["it's", TEXT + '"'])[10:-3],
    ],
)
def test_text_is_found_as_templates_rewrite_it(written: str) -> None:
    registry = ContextRegistry()
    registry.register([TEXT, TEXT.replace('"', "")])
    assert found(registry, f"before {written} after") == [written]


def test_rewritten_forms_follow_later_registrations_and_evictions() -> None:
    registry = ContextRegistry(max_texts=2)
    registry.register(["one & two"])
    assert found(registry, "one &amp; two") == ["one &amp; two"]
    registry.register(["three & four", "five & six"])
    assert found(registry, "one &amp; two, three &amp; four") == ["three &amp; four"]


SHORT = st.text("ab", min_size=1, max_size=11)
LONG = st.text("ab", max_size=8).map("one head for all ".__add__)


@settings(deadline=None)
@given(
    st.lists(SHORT | LONG, max_size=30),
    st.lists(SHORT | LONG, max_size=4).map("".join),
    st.data(),
)
def test_index_agrees_with_brute_force(texts: list[str], prompt: str, data: st.DataObject) -> None:
    index = TextIndex()
    for text in texts:
        index.add(text)
    removed = data.draw(st.sets(st.sampled_from(texts))) if texts else set()
    for text in removed:
        for _ in range(texts.count(text)):
            index.remove(text)
    members = set(texts) - removed
    for position in range(len(prompt)):
        expected = [text for text in members if prompt.startswith(text, position)]
        assert list(index.at(prompt, position)) == sorted(expected, key=len, reverse=True)


def test_threads_may_register_and_search_at_once() -> None:
    registry = ContextRegistry(max_texts=50)
    registry.register(["the fixed text of this test"])
    problems: list[object] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            for _ in range(200):
                number = chooser.randrange(40)
                registry.register(
                    ["the fixed text of this test", f"shared head {number} &"], str(seed)
                )
                prompt = f"shared head {number} &amp; the fixed text of this test"
                if found(registry, prompt)[-1] != "the fixed text of this test":
                    problems.append(prompt)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
