"""The command ``warm``: encode files ahead of the first question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ape_integrations.cli.options import AsJson, CacheDir, print_json
from ape_integrations.errors import ConfigError


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
    killed goes on where it was.
    """
    from ape_integrations import APELLM, APECacheWarmer

    if chunk_overlap >= chunk_size:
        raise ConfigError("--chunk-overlap must be smaller than --chunk-size.")
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        raise ConfigError(f"There is no file or folder {missing[0]}.")
    paths = [p for path in files for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]

    from llama_index.core import SimpleDirectoryReader
    from llama_index.core.node_parser import SentenceSplitter

    documents = SimpleDirectoryReader(input_files=[p for p in paths if p.is_file()]).load_data()
    splitter = SentenceSplitter(chunk_size=chunk_size, chunk_overlap=chunk_overlap)
    nodes = splitter.get_nodes_from_documents(documents)
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
