from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from ape_integrations.chatbot import Library, Passage, Turn
from ape_integrations.chatbot.conversation import Sequential
from ape_integrations.chatbot.figures import figures_line, panel
from ape_integrations.chatbot.markup import as_markdown, documents, messages, sources
from tests.chatbot.conftest import Echo

EVIL = '<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">'
REPORT = {
    "contexts": 4,
    "hits": 3,
    "misses": 1,
    "bytes_loaded": 1_200_000,
    "first_token_seconds": 0.02,
}


def tags(html: str) -> set[str]:
    return set(re.findall(r"<\s*/?([a-z0-9]+)", html.lower()))


@pytest.mark.parametrize("text", [EVIL, f"para\n\n{EVIL}", f"`code` {EVIL}", f"a\r\n{EVIL}"])
def test_html_in_an_answer_or_question_is_text(text: str) -> None:
    assert not tags(as_markdown(text))


def test_code_is_left_to_markdown() -> None:
    code = "Write:\n```python\nif a < b: pass\n```\nor `a < b`, and 1 < 2."
    shown = as_markdown(code)
    assert "if a < b: pass" in shown
    assert "`a < b`" in shown
    assert "1 &lt; 2" in shown


def test_pictures_in_markdown_are_not_fetched() -> None:
    assert "![" not in as_markdown("![x](http://example.org/track.png)")


def test_html_in_a_document_or_its_name_is_text() -> None:
    html = sources([Passage(f"One.\n\n{EVIL}", f"{EVIL}.txt")])
    assert tags(html) == {"div", "details", "summary"}
    # A blank line would end the HTML block in Markdown.
    assert "\n" not in html


def test_most_of_many_sources_open_with_a_click() -> None:
    html = sources([Passage(f"Text {number}.", f"{number}.txt") for number in range(6)])
    before, after = html.split("<summary>2 more</summary>")
    assert "Text 3." in before
    assert "Text 4." not in before
    assert "Text 5." in after


def test_names_and_problems_of_documents_are_text(
    echo: Echo, open_library: Callable[..., Library], folder: object
) -> None:
    library = open_library(echo)
    library._problems["x"] = EVIL
    library._files = {f"{EVIL}.txt": next(iter(library._files.values()))}
    assert not {"script", "img"} & tags(documents(library))


def test_an_error_and_a_differing_answer_are_text() -> None:
    failed = Turn("?", state="failed", error=EVIL)
    assert not {"script", "img"} & tags(str(messages([failed])))
    turn = Turn("?", "yes", report=REPORT, state="done", sequential=Sequential(EVIL, 0.1))
    assert not {"script", "img"} & tags(panel([turn]))


def test_the_panel_shows_the_measured_gain() -> None:
    turn = Turn("?", "yes", report=REPORT, state="done", sequential=Sequential("yes", 0.1))
    html = panel([turn])
    for figure in ("20 ms", "100 ms", "5.0x", "sooner", "3 of 4", "1.2 MB", "word for word"):
        assert figure in html
    assert html.count("<rect") == 2
    assert figures_line(turn) == (
        "first token after 20 ms, 3 of 4 passages from the cache, 1.2 MB read, "
        "sequentially after 100 ms (5.0x sooner)"
    )


def test_a_slower_answer_is_called_later() -> None:
    turn = Turn("?", "yes", report=REPORT, state="done", sequential=Sequential("yes", 0.01))
    assert "2.0x later" in figures_line(turn)


def test_a_comparison_that_was_not_possible_says_why() -> None:
    sequential = Sequential(problem="the prompt is too long")
    turn = Turn("?", "yes", report=REPORT, state="done", sequential=sequential)
    assert "the prompt is too long" in panel([turn])
    assert turn.gain is None


def test_a_stopped_answer_has_no_figures() -> None:
    turn = Turn("?", "ye", state="stopped")
    assert figures_line(turn) == ""
    assert "first answer" in panel([turn])
    assert "Stopped." in messages([turn])[1]["content"]
