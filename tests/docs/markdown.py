"""Code blocks of a Markdown page, and what the page says about running them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from markdown_it import MarkdownIt

PYTHON = ("python", "py")
SHELL = ("sh", "bash", "shell", "console")
#: Fences without a language hold commands where they begin with one of these.
COMMANDS = ("ape-integrations", "make", "pip", "python", "git", "cd")

_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)
_HIDDEN = re.compile(r"<!--\s*```python\n(.*?)```\s*-->", re.DOTALL)
_OUTPUT = re.compile(r"\btitle=\"Output\"")


@dataclass
class Block:
    """One code block.

    Parameters
    ----------
    page : Path
        Where it stands.
    line : int
        Line of its first line of code, from 1.
    language : str
        ``"python"``, ``"shell"`` or something else.
    code : str
        Its text.
    not_run : str
        Why it is not run; empty where it is.
    output : str or None
        What it prints, where the page shows that.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str = ""
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a shell block, with patterns of files spelled out."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        return [
            [word for pattern in one for word in sorted(glob(pattern)) or [pattern]]
            for one in words
            if one
        ]


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page, in order.

    ``<!-- not run: reason -->`` before a fence says that it cannot run; a fence titled "Output"
    shows what the block before it prints; a fence within a comment is code that readers need not
    see.
    """
    found: list[Block] = []
    not_run = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        line = token.map[0] + 2 if token.map else 0
        if token.type == "html_block":
            reason = _NOT_RUN.search(token.content)
            not_run = reason[1] if reason else not_run
            if hidden := _HIDDEN.search(token.content):
                found.append(Block(page, line, "python", hidden[1]))
        elif token.type == "fence" and _OUTPUT.search(token.info):
            found[-1].output = token.content
        elif token.type in ("fence", "code_block"):
            language = _language(token.info, token.content)
            found.append(Block(page, line, language, token.content, not_run))
            not_run = ""
    return found


def _language(info: str, code: str) -> str:
    name = info.split()[0].lower() if info.strip() else ""
    if name in PYTHON:
        return "python"
    words = code.split()
    if name in SHELL or (not name and words and words[0] in COMMANDS):
        return "shell"
    return name
