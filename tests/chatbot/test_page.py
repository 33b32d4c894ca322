"""The page as a person uses it, in a headless browser.

``APE_SCREENSHOTS=docs/images`` writes the pictures of the documentation.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ape_integrations.chatbot import Library, Pipeline
from ape_integrations.chatbot.serve import make_page
from tests.chatbot.conftest import example_pipeline

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("gradio", reason="Gradio is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: install chromium")

EVIL = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
LIMIT = 1_000_000


@dataclass
class Server:
    """A page that is served, and what is behind it."""

    address: str
    pipeline: Pipeline
    library: Library


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("store")
    pipeline, arguments = example_pipeline("chatbot_llamaindex", cache, "--max-file-size", "1MB")
    page, library = make_page(pipeline, arguments, Console(quiet=True))
    library.start()
    assert library.wait(60)
    address = page.launch("127.0.0.1", 0, max_file_bytes=LIMIT, prevent_thread_lock=True)
    yield Server(address, pipeline, library)
    page.blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Without a sandbox, because tests may run as root in a container.
    options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


class Tab:
    """A tab of the browser with the page in it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.foreign: list[str] = []
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self._note(request.url))
        page.goto(address)
        self.question = page.locator("#ape-question textarea")
        self.wait_for_input()

    def _note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.foreign.append(url)

    def wait_for_input(self) -> None:
        self.page.wait_for_selector("#ape-question textarea:not([disabled])")

    def ask(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def sees(self, where: str, what: str) -> None:
        sync_api.expect(self.page.locator(where)).to_contain_text(what, timeout=30_000)

    def upload(self, *files: dict[str, Any]) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.click("#ape-upload")
        chooser.value.set_files(list(files))

    @property
    def answers(self) -> Any:
        return self.page.locator("#ape-chat [data-testid=bot] .message-content")


def file(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "text/plain", "buffer": content}


@pytest.fixture
def open_tab(browser: Any, server: Server) -> Iterator[Callable[..., Tab]]:
    contexts, tabs = [], []

    def open_(**options: Any) -> Tab:
        context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
        contexts.append(context)
        tabs.append(Tab(context.new_page(), server.address))
        return tabs[-1]

    yield open_
    # No CDN, no fonts, no telemetry: it must work without a network.
    assert [url for tab in tabs for url in tab.foreign] == []
    assert not any(tab.page.evaluate("window.pwned") for tab in tabs)
    for context in contexts:
        context.close()


@pytest.fixture
def endless(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model go on until it is stopped."""
    generate = server.pipeline.generator.model.generate

    def long(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **{**kwargs, "max_new_tokens": 4000, "min_new_tokens": 4000})

    monkeypatch.setattr(server.pipeline.generator.model, "generate", long)


def answering(library: Library) -> int:
    return library._answering


def test_asking_sources_comparing_and_reloading(
    open_tab: Callable[..., Tab], server: Server
) -> None:
    tab = open_tab()
    # An example is asked with a click, and answered with its figures.
    tab.page.click("text=Where is Argent Optics based?")
    tab.sees("#ape-chat", "Argent Optics operates from Geneva.")
    passages = len(server.library.passages)
    tab.sees("#ape-figures", f"{passages} of {passages}")
    assert "sequentially" not in tab.page.inner_text(".ape-big")

    # A source opens its passage.
    passage = tab.page.locator(".ape-passage").first
    assert not passage.is_visible()
    tab.page.locator(".ape-source summary").first.click()
    sync_api.expect(passage).to_be_visible()
    assert "Argent Optics sells mirrors." in passage.inner_text()

    # The switch compares the last answer, and from now on each one.
    tab.page.check("#ape-compare input")
    tab.sees(".ape-big", "sequentially")
    tab.ask("What is the price of the Opal Lamp?")
    tab.sees("#ape-figures", "Answer 2")
    tab.sees(".ape-big", "sequentially")
    assert tab.page.locator("#ape-figures rect").count() == 4

    # A question without text is no question.
    tab.ask("   ")
    sync_api.expect(tab.page.locator(".toast-body")).to_contain_text("Write a question first.")

    # Loaded again, the conversation is still there.
    tab.page.reload()
    tab.wait_for_input()
    tab.sees("#ape-chat", "The Opal Lamp sells for 38 euros.")
    tab.sees("#ape-figures", "Answer 2")
    tab.page.click("#ape-clear")
    sync_api.expect(tab.answers).to_have_count(0)


def test_html_in_a_question_and_in_an_uploaded_document_is_shown_as_text(
    open_tab: Callable[..., Tab],
) -> None:
    tab = open_tab()
    tab.upload(file("zebra.md", f"The zebra lives in Quito. {EVIL}".encode()))
    tab.sees("#ape-documents", "27 files")
    tab.ask(f"Where does the zebra live? {EVIL}")
    tab.sees("#ape-figures", "Answer 1")
    tab.sees("#ape-chat [data-testid=user]", "<script>window.pwned = 1</script>")
    source = tab.page.locator(".ape-source", has_text="zebra.md")
    source.locator("summary").click()
    assert EVIL in source.locator(".ape-passage").inner_text()
    assert tab.page.locator("#ape-chat script, #ape-chat img[src=x]").count() == 0


def test_uploads_that_cannot_be_read_are_refused_with_the_reason(
    open_tab: Callable[..., Tab], server: Server
) -> None:
    tab = open_tab()
    before = server.library.files
    tab.upload(file("binary.txt", b"\x89PNG\0\0"))
    sync_api.expect(tab.page.locator(".toast-body")).to_contain_text("Save it as UTF-8")
    tab.upload(file("large.txt", b"word " * (LIMIT // 4)))
    toasts = tab.page.locator(".toast-wrap")
    sync_api.expect(toasts).to_contain_text(re.compile("size|large", re.IGNORECASE))
    assert server.library.files == before


def test_answers_stream_and_stop(
    open_tab: Callable[..., Tab], server: Server, endless: None
) -> None:
    tab = open_tab()
    tab.ask("Where is Argent Optics based?")
    text = "() => document.querySelector('#ape-chat [data-testid=bot] p')?.innerText.length || 0"
    tab.page.wait_for_function(f"({text})() > 5")
    seen = tab.page.evaluate(text)
    tab.page.wait_for_function(f"({text})() > {seen}")
    assert answering(server.library) == 1
    tab.page.click("#ape-question button.stop-button")
    tab.sees("#ape-chat", "Stopped.")
    with server.library._quiet:
        assert server.library._quiet.wait_for(lambda: not answering(server.library), timeout=20)
    # The next question is possible at once.
    sync_api.expect(tab.page.locator("#ape-question button.submit-button")).to_be_visible()


def test_closing_the_tab_stops_the_answer(
    open_tab: Callable[..., Tab], server: Server, endless: None
) -> None:
    tab = open_tab()
    tab.ask("Where is Argent Optics based?")
    tab.page.wait_for_selector("#ape-chat [data-testid=bot]")
    tab.page.goto("about:blank")
    with server.library._quiet:
        assert server.library._quiet.wait_for(lambda: not answering(server.library), timeout=20)


def test_two_tabs_at_once_have_separate_conversations(open_tab: Callable[..., Tab]) -> None:
    one, two = open_tab(), open_tab()
    one.ask("Where is Argent Optics based?")
    two.ask("In which month is the Polar Festival?")
    one.sees("#ape-chat", "Geneva")
    two.sees("#ape-chat", "February")
    assert one.answers.count() == two.answers.count() == 1
    assert "February" not in one.page.inner_text("#ape-chat")


def test_reading_shows_a_progress_bar(
    open_tab: Callable[..., Tab], server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go_on, warm = threading.Event(), server.pipeline.warm

    def slowly(passages: Any) -> None:
        go_on.wait(30)
        warm(passages)

    monkeypatch.setattr(server.pipeline, "warm", slowly)
    added = tmp_path / "okapi.txt"
    added.write_text("The okapi lives in Oslo.")
    server.library.add(added, "okapi.txt")
    tab = open_tab()
    sync_api.expect(tab.page.locator("#ape-documents [role=progressbar]")).to_be_visible()
    tab.sees("#ape-documents", "You can ask already.")
    go_on.set()
    sync_api.expect(tab.page.locator("#ape-documents [role=progressbar]")).to_have_count(0)


@pytest.mark.skipif("APE_SCREENSHOTS" not in os.environ, reason="APE_SCREENSHOTS is not set")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(open_tab: Callable[..., Tab], scheme: str) -> None:
    tab = open_tab(color_scheme=scheme)
    tab.page.check("#ape-compare input")
    questions = (
        "Where is Argent Optics based?",
        "Which company employs Tessa Parr?",
        "What is the price of the Opal Lamp?",
        "In which month is the Polar Festival?",
        "Where is Argent Optics based?",
    )
    for number, question in enumerate(questions, 1):
        tab.ask(question)
        tab.sees("#ape-figures", f"Answer {number}")
        sync_api.expect(tab.page.locator("#ape-figures rect")).to_have_count(2 * number)
        sync_api.expect(tab.page.locator("#ape-question button.submit-button")).to_be_visible()
    tab.answers.last.locator(".ape-source summary").first.click()
    tab.page.locator(".ape-more > summary").last.scroll_into_view_if_needed()
    tab.page.mouse.move(0, 0)
    tab.page.wait_for_timeout(500)
    suffix = "" if scheme == "light" else "-dark"
    tab.page.screenshot(path=Path(os.environ["APE_SCREENSHOTS"]) / f"chatbot{suffix}.png")
