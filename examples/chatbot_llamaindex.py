"""Chat over a folder of files with LlamaIndex, and see what the cache does for each answer.

The page is made with Gradio: plain Python in one process, with a side panel and no account, cloud
service or second server. It needs no network, and what is asked stays on this machine.

    pip install '.[chat]'
    python examples/chatbot_llamaindex.py
    python examples/chatbot_llamaindex.py my_files/ --model Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_index.core import ChatPromptTemplate, SimpleDirectoryReader
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode
from llama_index.retrievers.bm25 import BM25Retriever

from ape_integrations import APELLM
from ape_integrations.chatbot.arguments import parse_arguments
from ape_integrations.chatbot.llama_index import HTMLReader, LlamaIndexPipeline
from ape_integrations.chatbot.serve import serve

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Context information is below.\n\n{context_str}\n\nAnswer from the context."),
        ("user", "{query_str}"),
    ]
)


def main() -> None:
    """Build the pipeline, serve the page."""
    arguments = parse_arguments(__doc__, Path(__file__).parent / "data")
    # The LLM is the only line that differs from any other LlamaIndex program.
    llm = APELLM(
        model_name=arguments.model,
        cache_dir=arguments.cache_dir,
        max_new_tokens=arguments.max_new_tokens,
        generate_kwargs={"do_sample": False},
    )
    html = HTMLReader()
    splitter = SentenceSplitter(chunk_size=arguments.chunk_size, chunk_overlap=0)

    def read(path: Path) -> Sequence[BaseNode]:
        documents = SimpleDirectoryReader(
            input_files=[path], file_extractor={".html": html, ".htm": html}
        ).load_data()
        return splitter.get_nodes_from_documents(documents)

    def retriever(nodes: list[BaseNode]) -> BM25Retriever:
        top_k = min(arguments.top_k, len(nodes))
        return BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=top_k)

    serve(LlamaIndexPipeline(llm, PROMPT, read, retriever), arguments)


if __name__ == "__main__":
    main()
