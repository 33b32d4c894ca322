"""What the README's readers have already: documents, an index, a chain's parts."""

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter

documents = SimpleDirectoryReader("examples/data", required_exts=[".txt"]).load_data()[:4]
index = VectorStoreIndex.from_documents(documents)


class _Everything(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(page_content=document.text) for document in documents]


def format_docs(found):
    return "\n\n".join(document.page_content for document in found)


retriever = _Everything()
prompt = ChatPromptTemplate([("system", "{context}"), ("human", "{question}")])
texts = [document.text for document in documents]
prefix, question = "Answer from these documents.\n\n", "Who founded the company?"
