"""Serves a pipeline's page, as the command line says."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.markup import escape

from ape_integrations.chatbot.introduction import (
    Introduction,
    example_questions,
    model_note,
    quiet_logs,
)
from ape_integrations.chatbot.library import Library
from ape_integrations.chatbot.page import Page
from ape_integrations.chatbot.pipeline import Pipeline
from ape_integrations.errors import APEError
from ape_integrations.models import DEMO_MODEL_NAME


def serve(pipeline: Pipeline, arguments: argparse.Namespace) -> None:
    """Load the model, start reading the files, and serve the page until it is interrupted.

    Parameters
    ----------
    pipeline : Pipeline
        Answers.
    arguments : argparse.Namespace
        From ``parse_arguments``.
    """
    quiet_logs()
    console = Console(highlight=False)
    try:
        page, library = make_page(pipeline, arguments, console)
        library.start()
        address = page.launch(
            arguments.host,
            arguments.port,
            max_file_bytes=arguments.max_file_size,
            inbrowser=arguments.open,
            prevent_thread_lock=True,
        )
    except APEError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:  # the port is taken
        sys.exit(f"Error: {error} Choose another port with --port.")
    said = f"Chat over {escape(str(library.folder))} at [bold]{address}[/bold]  (Ctrl-C ends it)"
    console.print(said, soft_wrap=True)
    page.blocks.block_thread()


def make_page(
    pipeline: Pipeline, arguments: argparse.Namespace, console: Console
) -> tuple[Page, Library]:
    """Return the page and its library."""
    library = Library(
        pipeline,
        arguments.folder,
        directory=arguments.cache_dir,
        key=f"{arguments.model} {arguments.chunk_size}",
        max_file_bytes=arguments.max_file_size,
    )
    with console.status("Loading the model ..."):
        generator = pipeline.generator
    name = arguments.model or DEMO_MODEL_NAME
    introduction = Introduction(
        title=f"Chat with {pipeline.framework} and APE",
        model=f"{name}, {generator.model.num_parameters() / 1e6:.0f}M parameters",
        note=model_note(arguments.model, demo_files=arguments.default_files),
        examples=example_questions(library.folder),
    )
    return Page(pipeline, library, introduction, arguments.max_new_tokens), library
