"""What a chatbot says before the first question."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ape_integrations.chatbot.files import EXAMPLES_FILE
from ape_integrations.models import DEMO_MODEL_NAME

#: Questions that can be asked with a click.
_EXAMPLES = 6

_OTHER_MODEL = "For your own files, start with --model and a real model."

#: Said where the bundled model answers from the documents that it was made for.
NOTE_DEMO_FILES = (
    f"{DEMO_MODEL_NAME} is a demo model of a few million parameters: it knows the invented world "
    f"of these documents and no other. {_OTHER_MODEL}"
)

#: Said where the bundled model answers from other documents.
NOTE_OTHER_FILES = (
    f"{DEMO_MODEL_NAME} is a demo model: it knows only the invented world of its own documents "
    "(examples/data) and will not understand others. Start with --model and a real model, such as "
    "Qwen/Qwen2.5-0.5B-Instruct."
)


@dataclass(frozen=True)
class Introduction:
    """What stands above a conversation.

    Parameters
    ----------
    title : str
        The heading.
    model : str
        The model's name.
    note : str
        What one should know before asking.
    examples : sequence of str
        Questions that can be asked with a click.
    """

    title: str
    model: str
    note: str = ""
    examples: Sequence[str] = ()


def model_note(model: str | None, *, demo_files: bool) -> str:
    """Say what the model can answer; nothing where the user named one."""
    if model is not None:
        return ""
    return NOTE_DEMO_FILES if demo_files else NOTE_OTHER_FILES


def example_questions(folder: Path) -> list[str]:
    """Return questions that a folder's `EXAMPLES_FILE` marks as fit for a first try.

    Only those that stand alone and are answered by one file: whether word search finds a second
    one is chance.
    """
    try:
        listed = json.loads((folder / EXAMPLES_FILE).read_text(encoding="utf-8"))
        marked = [
            str(one["question"])
            for one in listed
            if one.get("quickstart") and "history" not in one and len(one["sources"]) == 1
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return marked[:_EXAMPLES]


def quiet_logs() -> None:
    """Leave the terminal to what users need: warnings, without ornament or progress bars."""
    from transformers.utils.logging import disable_progress_bar

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    disable_progress_bar()
    for name in ("bm25s", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Which model answers is said by the page and by the terminal themselves.
    logging.getLogger("ape_integrations.core.loading").setLevel(logging.ERROR)
