"""The command ``chat``: a conversation about a folder of files in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ape_integrations.cli.options import CacheDir
from ape_integrations.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from ape_integrations.chatbot.llama_index import LlamaIndexPipeline


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(chat)


def chat(
    folder: Annotated[Path, typer.Argument(help="Your files: txt, md, pdf, html.")],
    model: Annotated[
        str | None, typer.Option(help="Name or folder of the model. Default: the bundled one.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Passages to retrieve.")] = 4,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a passage.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    max_file_size: Annotated[
        str, typer.Option(help="Larger files are left out.", metavar="SIZE")
    ] = "50MB",
    cache_dir: CacheDir = None,
) -> None:
    """Chat about a folder of files, and see what the cache does for each answer.

    The first start reads the files and encodes them; later starts read what has changed. Needs the
    extra "chat".
    """
    from rich.console import Console

    from ape_integrations.chatbot.conversation import Conversation
    from ape_integrations.chatbot.introduction import NOTE_OTHER_FILES, quiet_logs
    from ape_integrations.chatbot.library import Library
    from ape_integrations.chatbot.terminal import Terminal, show_progress
    from ape_integrations.store.sizes import parse_size

    console = Console(highlight=False)
    pipeline = _pipeline(model, cache_dir, top_k, chunk_size, max_new_tokens)
    quiet_logs()
    library = Library(
        pipeline,
        folder,
        directory=cache_dir,
        key=f"{model} {chunk_size}",
        max_file_bytes=parse_size(max_file_size, "--max-file-size"),
    )
    with console.status("Loading the model ..."):
        generator = pipeline.generator
    if model is None:
        console.print(NOTE_OTHER_FILES, style="dim")
    show_progress(library, console)
    for problem in library.problems:
        console.print(problem, style="yellow", markup=False)
    if not library.passages:
        raise ConfigError(library.why_empty())
    console.print(f"{len(library.files)} files, {len(library.passages)} passages.", style="dim")
    Terminal(Conversation(pipeline, library, max_new_tokens), library, console).run()
    generator.close()


def _pipeline(
    model: str | None, cache_dir: Path | None, top_k: int, chunk_size: int, max_new_tokens: int
) -> LlamaIndexPipeline:
    try:
        from llama_index.core import ChatPromptTemplate, SimpleDirectoryReader
        from llama_index.core.node_parser import SentenceSplitter
        from llama_index.core.schema import BaseNode
        from llama_index.retrievers.bm25 import BM25Retriever
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed: pip install 'ape-integrations[chat]'"
        ) from error

    from ape_integrations import APELLM
    from ape_integrations.chatbot.llama_index import HTMLReader, LlamaIndexPipeline

    llm = APELLM(
        model_name=model,
        cache_dir=cache_dir,
        max_new_tokens=max_new_tokens,
        generate_kwargs={"do_sample": False},
    )
    html = HTMLReader()
    splitter = SentenceSplitter(chunk_size=chunk_size, chunk_overlap=0)
    prompt = ChatPromptTemplate.from_messages(
        [
            (
                "system",
                "Context information is below.\n\n{context_str}\n\nAnswer from the context.",
            ),
            ("user", "{query_str}"),
        ]
    )

    def read(path: Path) -> Sequence[BaseNode]:
        documents = SimpleDirectoryReader(
            input_files=[path], file_extractor={".html": html, ".htm": html}
        ).load_data()
        return splitter.get_nodes_from_documents(documents)

    def retriever(nodes: list[BaseNode]) -> BM25Retriever:
        return BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=min(top_k, len(nodes)))

    return LlamaIndexPipeline(llm, prompt, read, retriever)
