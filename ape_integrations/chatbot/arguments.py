"""The command line of the chatbots with a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ape_integrations.chatbot.files import MAX_FILE_BYTES
from ape_integrations.errors import ConfigError
from ape_integrations.store.sizes import parse_size

DEFAULT_PORT = 7860

#: Passages to retrieve.
TOP_K = 4

#: Of the demo's documents, each of which is no longer than two or three sentences: all of them make
#: a prompt as long as a few pages of other files.
DEMO_TOP_K = 32


def parse_arguments(description: str | None, default_folder: Path) -> argparse.Namespace:
    """Read the command line.

    Parameters
    ----------
    description : str or None
        The program's docstring; its first line is shown.
    default_folder : Path
        Files to answer from where none are named.
    """
    first_line = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=default_folder,
        help="your files: txt, md, pdf, html (default: %(default)s)",
    )
    parser.add_argument("--model", help="Hub name or directory (default: the bundled model)")
    parser.add_argument("--cache-dir", type=Path, help="the store (default: the user's cache)")
    parser.add_argument(
        "--top-k",
        type=positive,
        help=f"passages to retrieve (default: {TOP_K}, and all of the demo's short ones)",
    )
    parser.add_argument("--chunk-size", type=positive, default=512, help="tokens of a passage")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="tokens of an answer")
    parser.add_argument(
        "--max-file-size",
        type=_size,
        default=MAX_FILE_BYTES,
        help='larger files are left out, such as "50MB" (the default)',
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0 takes any free one")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    arguments = parser.parse_args()
    arguments.default_files = arguments.folder.resolve() == default_folder.resolve()
    if arguments.top_k is None:
        arguments.top_k = DEMO_TOP_K if arguments.default_files else TOP_K
    return arguments


def positive(text: str) -> int:
    """Return a whole number of at least 1.

    Raises
    ------
    argparse.ArgumentTypeError
        It is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text, "--max-file-size")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
