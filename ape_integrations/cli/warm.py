"""The command ``warm``: encode files ahead of the first question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ape_integrations.cli.options import AsJson, CacheDir, print_json
from ape_integrations.errors import ConfigError

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode, Document


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(warm)


def warm(
    files: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    model: Annotated[
        str | None, typer.Option(help="Name or folder of the model. Default: the bundled one.")
    ] = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a node.")] = 1024,
    chunk_overlap: Annotated[int, typer.Option(min=0, help="Tokens that nodes share.")] = 200,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Encode files as a LlamaIndex pipeline with default prompts would read them.

    Files are cut by SentenceSplitter. What is stored already is left alone, so that a run that was
    killed goes on where it was. Files that cannot be read are named; the status is 1 if that is all
    of them.
    """
    from ape_integrations import APELLM, APECacheWarmer

    if chunk_overlap >= chunk_size:
        raise ConfigError("--chunk-overlap must be smaller than --chunk-size.")
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        raise ConfigError(f"There is no file or folder {missing[0]}.")
    # A path is part of a node's text, and SimpleDirectoryReader(folder) makes it absolute.
    given = [path.absolute() for path in files]
    paths = [p for path in given for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    documents = _read([path for path in paths if path.is_file()])
    if not documents:
        raise ConfigError(
            f"No file in {', '.join(map(str, files))} can be read. Name text files, or folders of "
            "them."
        )
    nodes = _cut(documents, chunk_size, chunk_overlap)
    llm = APELLM(model_name=model, cache_dir=cache_dir)
    before = llm.generator.store.stats()
    APECacheWarmer(llm=llm, show_progress=not as_json)(nodes)
    llm.generator.close()
    after = llm.generator.store.stats()
    report = {
        "files": len(documents),
        "nodes": len(nodes),
        "entries_before": before.entries,
        "entries": after.entries,
        "bytes": after.bytes,
    }
    if as_json:
        print_json(report)
    else:
        added = after.entries - before.entries
        typer.echo(f"{len(nodes)} nodes of {len(documents)} documents, {added} new entries.")


def _read(paths: Sequence[Path]) -> list[Document]:
    """Read files as SimpleDirectoryReader does, and name those that cannot be read."""
    from llama_index.core import SimpleDirectoryReader

    documents: list[Document] = []
    for path in paths:
        reader = SimpleDirectoryReader(input_files=[path], raise_on_error=True)
        try:
            documents += reader.load_data()
        except Exception as error:  # readers raise whatever they like
            typer.echo(f"{path} cannot be read: {error.__cause__ or error}", err=True)
    return documents


def _cut(documents: Sequence[Document], chunk_size: int, chunk_overlap: int) -> list[BaseNode]:
    from llama_index.core.node_parser import SentenceSplitter

    splitter = SentenceSplitter(chunk_size=chunk_size, chunk_overlap=chunk_overlap)
    try:
        return splitter.get_nodes_from_documents(documents)
    except ValueError as error:
        raise ConfigError(
            f"--chunk-size {chunk_size} is too small: the path of a file is part of its nodes and "
            "leaves no room for text. Give a larger one."
        ) from error
