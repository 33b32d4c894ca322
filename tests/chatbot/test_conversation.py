from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ape_integrations.chatbot import Conversation, Library, Turn
from ape_integrations.chatbot.conversation import KEPT_CONVERSATIONS, Conversations
from ape_integrations.errors import ConfigError, ContextWindowError
from tests.chatbot.conftest import Echo

Open = Callable[..., Library]


@pytest.fixture
def conversation(echo: Echo, open_library: Open) -> Conversation:
    return Conversation(echo, open_library(echo), 8)


def ask(conversation: Conversation, question: str) -> Turn:
    *_, turn = conversation.ask(question)
    return turn


def test_an_answer_comes_with_its_passages_and_figures(conversation: Conversation) -> None:
    turn = ask(conversation, "  Where does Porto lie? ")
    assert turn.question == "Where does Porto lie?"
    assert turn.answer == "Porto lies on the Douro."
    assert turn.state == "done"
    assert [passage.source for passage in turn.passages] == ["porto.txt", "porto.txt"]
    assert turn.report["hits"] == 1


def test_earlier_turns_are_the_history(echo: Echo, conversation: Conversation) -> None:
    for question in ("one", "two", "three"):
        ask(conversation, question)
    assert echo.histories == [[], ["one"], ["one", "two"]]
    conversation.clear()
    ask(conversation, "four")
    assert echo.histories[-1] == []


@pytest.mark.parametrize("question", ["", "  \n "])
def test_an_empty_question_is_refused(conversation: Conversation, question: str) -> None:
    with pytest.raises(ConfigError, match="Write a question first"):
        conversation.ask(question)
    assert conversation.turns == []


def test_without_documents_the_question_is_refused(
    echo: Echo, open_library: Open, folder: Any
) -> None:
    (folder / "porto.txt").unlink()
    with pytest.raises(ConfigError, match="nothing to read"):
        Conversation(echo, open_library(echo), 8).ask("Where?")


def test_stop_ends_the_answer_and_closes_the_model_s_stream(
    echo: Echo, conversation: Conversation
) -> None:
    echo.endless = True
    for turn in conversation.ask("Where?"):
        if len(turn.answer) > 20:
            conversation.stop()
    assert turn.state == "stopped"
    assert echo.closed.wait(5)
    length = len(turn.answer)
    time.sleep(0.05)
    assert len(turn.answer) == length
    echo.endless = False
    assert ask(conversation, "And now?").state == "done"


def test_dropping_the_answer_stops_it(echo: Echo, conversation: Conversation) -> None:
    echo.endless = True
    turns = conversation.ask("Where?")
    next(turns)
    next(turns)
    turns.close()  # type: ignore[attr-defined]
    assert echo.closed.wait(5)
    assert conversation.turns[0].state == "stopped"


def test_a_second_question_has_to_wait(echo: Echo, conversation: Conversation) -> None:
    echo.endless = True
    turns = conversation.ask("Where?")
    next(turns)
    with pytest.raises(ConfigError, match="still being answered"):
        conversation.ask("And?")
    conversation.stop()
    list(turns)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ContextWindowError("too long: ask less"), "too long: ask less"),
        (RuntimeError("out of memory"), "The answer failed (RuntimeError: out of memory)."),
    ],
)
def test_a_failing_model_is_said_and_the_conversation_goes_on(
    echo: Echo, conversation: Conversation, monkeypatch: Any, error: Exception, said: str
) -> None:
    def fail(turn: Turn, history: Any) -> Any:
        yield "Por"
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(echo, "answer", fail)
        turn = ask(conversation, "Where?")
    assert (turn.state, turn.error) == ("failed", said)
    assert ask(conversation, "Where?").state == "done"


def test_two_conversations_have_separate_histories(echo: Echo, open_library: Open) -> None:
    library = open_library(echo)
    tabs = Conversations(lambda: Conversation(echo, library, 8))
    threads = [
        threading.Thread(target=lambda name=name: ask(tabs[name], f"from {name}"))
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("one", "two"):
        assert [turn.question for turn in tabs[name].turns] == [f"from {name}"]


def test_conversations_nobody_returned_to_are_forgotten(echo: Echo, open_library: Open) -> None:
    library = open_library(echo)
    tabs = Conversations(lambda: Conversation(echo, library, 8))
    ask(tabs["first"], "Where?")
    for number in range(KEPT_CONVERSATIONS):
        tabs[str(number)]
    assert tabs["first"].turns == []
