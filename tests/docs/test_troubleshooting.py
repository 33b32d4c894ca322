"""Every symptom of the troubleshooting page is provoked here, and goes away as the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from llama_index.core import PromptTemplate
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from ape_integrations import (
    APELLM,
    APECacheWarmer,
    APEConfig,
    APEDocumentCompressor,
    APEError,
    APEGenerator,
    ChatAPE,
    DiskKVStore,
    MemoryKVStore,
)
from tests.models import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"

TEXTS = (
    "The lamp of Amsel stands in the red room, where Dora reads at night.",
    "The boat of Birk lies in the north harbour and carries salt.",
)
TEXT_QA = PromptTemplate("Read this.\n\n{context_str}\n\nQuestion: {query_str}\n")

model = tiny_model(max_position_embeddings=8192)
tokenizer = byte_tokenizer()


def generator(**settings: Any) -> APEGenerator:
    store = settings.pop("store", None) or MemoryKVStore("50MB")
    made = APEGenerator(model, tokenizer, store=store, config=APEConfig(**settings))
    made.registry.register(TEXTS, "Where is the lamp?")
    return made


def llama_index(**settings: Any) -> APELLM:
    settings.setdefault("store", MemoryKVStore("50MB"))
    return APELLM(model=model, tokenizer=tokenizer, max_new_tokens=2, **settings)


def langchain(**settings: Any) -> ChatAPE:
    settings.setdefault("store", MemoryKVStore("50MB"))
    return ChatAPE(model=model, tokenizer=tokenizer, max_tokens=2, **settings)


class Fixed(BaseRetriever):
    """Retrieves the same nodes whatever is asked."""

    def __init__(self, nodes: Sequence[TextNode]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node, score=1.0) for node in self.nodes]


def engine(llm: APELLM, nodes: Sequence[TextNode] | None = None, **more: Any) -> Any:
    retriever = Fixed(nodes or [TextNode(text=text) for text in TEXTS])
    return RetrieverQueryEngine.from_args(retriever, llm=llm, **more)


class Reports(BaseEventHandler):
    """Keeps what the cache did in every LLM call of LlamaIndex."""

    seen: list[dict[str, Any]] = []

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)):
            self.seen.append(event.response.raw["ape"])


@pytest.fixture
def reports() -> Iterator[list[dict[str, Any]]]:
    root, handler = get_dispatcher(), Reports(seen=[])
    root.add_event_handler(handler)
    yield handler.seen
    root.event_handlers = [one for one in root.event_handlers if one is not handler]


# contexts is 0 -----------------------------------------------------------------------------------


def test_documents_of_no_retriever_are_unknown_until_registered() -> None:
    chat = langchain()
    message = f"{TEXTS[0]}\n\n{TEXTS[1]}\n\nWhere is the lamp?"
    assert chat.invoke(message).response_metadata["ape"]["contexts"] == 0
    compressor = APEDocumentCompressor(model=chat)
    compressor.transform_documents([Document(page_content=text) for text in TEXTS])
    assert chat.invoke(message).response_metadata["ape"]["contexts"] == 2


def test_documents_of_no_retriever_are_known_to_an_apellm_that_is_told() -> None:
    llm, prompt = llama_index(), f"{TEXTS[0]}\n\n{TEXTS[1]}\n\nWhere is the lamp?"
    assert llm.complete(prompt).raw["ape"]["contexts"] == 0
    llm.register_contexts(TEXTS)
    assert llm.complete(prompt).raw["ape"]["contexts"] == 2


def test_rewritten_text_is_not_recognised() -> None:
    made = generator()
    assert not made.split(f"Read.\n\n{TEXTS[0].upper()}\n\nWhere?").contexts
    assert made.split(f"Read.\n\n{TEXTS[0]}\n\nWhere?").contexts == (TEXTS[0],)


def test_text_inside_other_text_is_not_recognised_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = generator()
    assert not made.split(f"It is said that {TEXTS[0]} It is also said that she writes.").contexts
    assert "Put it on lines of its own" in caplog.text
    assert made.split(f"It is said:\n{TEXTS[0]}\nWhat else?").contexts == (TEXTS[0],)


def test_nodes_cut_by_a_small_window_are_not_recognised(reports: list[dict[str, Any]]) -> None:
    nodes = [TextNode(text=" ".join(f"{text} {i}" for i in range(12))) for text in TEXTS]
    for window, contexts in ((900, 0), (None, 2)):
        llm = llama_index(context_window=window)
        engine(llm, nodes, text_qa_template=TEXT_QA).query("Where is the lamp?")
        assert reports[-1]["contexts"] == contexts


def test_without_capture_nothing_is_recognised(reports: list[dict[str, Any]]) -> None:
    for capture, contexts in ((False, 0), (True, 2)):
        llm = llama_index(capture=capture)
        engine(llm).query("Where is the lamp?")
        assert reports[-1]["contexts"] == contexts


# Hits are 0 --------------------------------------------------------------------------------------


def _second_hits(made: APEGenerator, prompts: Sequence[str]) -> int:
    for prompt in prompts:
        result = made.generate_prompt(prompt, max_new_tokens=1)
        assert result.cache["contexts"] == 2
    return result.cache["hits"]


def test_changing_text_before_the_documents_spoils_reuse() -> None:
    documents = "\n\n".join(TEXTS)
    before = [f"It is {time} o'clock.\n\n{documents}\n\nWhere?" for time in (9, 10)]
    assert _second_hits(generator(), before) == 0
    behind = [f"Read.\n\n{documents}\n\nIt is {time} o'clock. Where?" for time in (9, 10)]
    assert _second_hits(generator(), behind) == 2


def test_chat_history_before_the_documents_gives_a_second_prefix() -> None:
    chat, history, hits = langchain(), [], []
    for question in ("Where is the lamp?", "Whose is the boat?", "Who reads?"):
        asked = HumanMessage(f"Context:\n{TEXTS[0]}\n\n{TEXTS[1]}\n\nQuestion: {question}")
        chat.generator.registry.register(TEXTS, question)
        answer = chat.invoke([SystemMessage("Read this."), *history, asked])
        hits.append(answer.response_metadata["ape"]["hits"])
        history += [HumanMessage(question), AIMessage("It is there.")]
    assert hits == [0, 0, 2]


def test_changing_metadata_spoils_reuse(reports: list[dict[str, Any]]) -> None:
    for excluded, hits in (([], 0), (["read_at"], 2)):
        llm = llama_index()
        for time in ("9:00", "9:01"):
            nodes = [
                TextNode(
                    text=text,
                    metadata={"read_at": time},
                    excluded_llm_metadata_keys=excluded,
                )
                for text in TEXTS
            ]
            engine(llm, nodes).query("Where is the lamp?")
        assert reports[-1]["contexts"] == 2
        assert reports[-1]["hits"] == hits


@pytest.mark.parametrize(
    ("labels", "hits"), [(("Source 1:", "Source 2:"), 0), (("lamp.txt:", "boat.txt:"), 2)]
)
def test_numbers_make_a_text_another_one_at_every_rank(labels: Sequence[str], hits: int) -> None:
    numbered = hits == 0
    prompts = []
    for order in ((0, 1), (1, 0)):
        names = labels if numbered else [labels[n] for n in order]
        texts = [f"{name}\n{TEXTS[n]}" for name, n in zip(names, order, strict=True)]
        prompts.append("Read this.\n\n" + "\n\n".join(texts) + "\n\nWhere is the lamp?")
    assert _second_hits(generator(), prompts) == hits


def test_keeping_the_order_spoils_reuse_where_the_question_comes_first() -> None:
    documents = "\n\n".join(TEXTS)
    questions = ("Where is the lamp?", "Who reads at night?")
    for reorder, hits in ((False, 0), (True, 2)):
        made = generator(reorder=reorder)
        made.registry.register((), questions[1])
        prompts = [f"Question: {q}\n\n{documents}\n\nAnswer:" for q in questions]
        assert _second_hits(made, prompts) == hits


def test_another_dtype_or_other_weights_are_another_model() -> None:
    store = MemoryKVStore("50MB")
    others = [tiny_model(dtype=torch.bfloat16, max_position_embeddings=8192)]
    others.append(tiny_model(max_position_embeddings=8192))
    with torch.no_grad():
        others[1].model.norm.weight.mul_(1.5)
    for one in (model, *others):
        result = APEGenerator(one, tokenizer, store=store).generate(
            "Read.", TEXTS, "Where?", max_new_tokens=1
        )
        assert result.cache["hits"] == 0


def test_store_that_is_too_small_shows_in_its_figures(tmp_path: Path) -> None:
    for name, limit in (("tiny", "10KB"), ("small", "60KB")):
        with DiskKVStore(tmp_path / name, size_limit=limit) as store:
            made = generator(store=store)
            for number in range(4):
                made.generate("Read.", [f"{TEXTS[0]} {number}"], "Where?", max_new_tokens=1)
            stats = store.stats()
            assert stats.put_failures if name == "tiny" else stats.evictions


def test_warming_for_another_prompt_gives_no_hits(reports: list[dict[str, Any]]) -> None:
    nodes = [TextNode(text=text) for text in TEXTS]
    for told, hits in ((False, 0), (True, 2)):
        llm = llama_index()
        asked = engine(llm, nodes, text_qa_template=TEXT_QA)
        warmer = APECacheWarmer(llm=llm, prompt=asked if told else None, show_progress=False)
        warmer(nodes)
        asked.query("Where is the lamp?")
        assert reports[-1]["contexts"] == 2
        assert reports[-1]["hits"] == hits


# Time and space ----------------------------------------------------------------------------------


def test_model_is_loaded_by_the_first_use(tmp_path: Path) -> None:
    llm = APELLM(model_name=str(tmp_path))  # holds no model, which nobody notices yet
    with pytest.raises(APEError, match=tmp_path.name):
        _ = llm.generator


def test_report_says_where_time_went() -> None:
    made = generator()
    cold = made.generate("Read.", TEXTS, "Where?", max_new_tokens=2).report()
    assert cold["encode_seconds"] > 0
    warm = made.generate("Read.", TEXTS, "Where?", max_new_tokens=2).report()
    assert warm["encode_seconds"] < cold["encode_seconds"]
    assert 0 < warm["first_token_seconds"] <= warm["total_seconds"]


def test_assembled_sets_can_be_given_back() -> None:
    made = generator()
    made.generate("Read.", TEXTS, "Where?", max_new_tokens=1)
    made.clear_assembled()
    result = made.generate("Read.", TEXTS, "Where?", max_new_tokens=1)
    assert result.cache["hits"] == 2
    assert result.cache["bytes_loaded"] > 0


# Answers -----------------------------------------------------------------------------------------


def test_sampling_gives_other_answers_and_greedy_decoding_the_same() -> None:
    made = generator()
    answers = {
        tuple(
            made.generate(
                "Read.", TEXTS, "Where?", max_new_tokens=8, do_sample=True, temperature=2.0, seed=s
            ).token_ids
        )
        for s in range(4)
    }
    assert len(answers) > 1
    greedy = {
        tuple(made.generate("Read.", TEXTS, "Where?", max_new_tokens=8, do_sample=False).token_ids)
        for _ in range(4)
    }
    assert len(greedy) == 1


def test_finish_reason_says_that_an_answer_was_cut() -> None:
    result = generator().generate("Read.", TEXTS, "Where?", max_new_tokens=1)
    assert result.finish_reason == "length"


def test_same_prompt_can_be_read_sequentially() -> None:
    made = generator()
    prompt = "Read.\n\n" + "\n\n".join(TEXTS) + "\n\nWhere?"
    parts = made.split(prompt)
    assert len(parts.contexts) == 2
    plain = made.generate("", [], prompt, max_new_tokens=4, do_sample=False)
    assert plain.cache["contexts"] == 0
    ids = torch.tensor([made.tokens.prompt(prompt)])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert plain.token_ids == expected.tolist()


# Errors and warnings -----------------------------------------------------------------------------


def _message(call: Any) -> str:
    with pytest.raises(APEError) as caught:
        call()
    return str(caught.value)


def test_messages_of_the_page_are_those_of_the_package(
    tmp_path: Path,
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    narrow = APEGenerator(tiny_model(max_position_embeddings=64), tokenizer, MemoryKVStore("9MB"))
    training = APEGenerator(tiny_model(), tokenizer, MemoryKVStore("9MB"))
    training.model.train()
    given = [
        _message(lambda: APEGenerator.from_pretrained(_saved(tmp_path, "t5"))),
        _message(lambda: narrow.generate("Read.", TEXTS, "Where? " * 40)),
        _message(lambda: DiskKVStore(shared)),
        _message(lambda: langchain().invoke("Hello", temprature=0)),
        _message(lambda: langchain().bind_tools([_tool]).invoke([HumanMessage("Hello")])),
        _message(lambda: APEConfig(attention_temperature=3)),
        _message(lambda: generator().warm("Read.", [""])),
        _message(lambda: generator().warm("Read.", [Document(page_content=TEXTS[0])])),
        _message(lambda: training.warm("Read.", TEXTS)),
    ]
    with pytest.warns(UserWarning) as warned:
        narrow.warm("Read.", ["x" * 99])
        narrow.generate("Read.", TEXTS, "Where?", max_new_tokens=2)
    given += [str(one.message) for one in warned]
    shown = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) >= 8
    for message in shown:
        words = ".*".join(re.escape(part.strip()) for part in message.split("..."))
        assert any(re.search(words, one, re.DOTALL) for one in given), (message, given)


def _tool(query: str) -> str:
    """Search the documents."""
    return query


def _saved(folder: Path, kind: str) -> Path:
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(folder / kind)
    return folder / kind


# The page ----------------------------------------------------------------------------------------


def test_every_section_names_tests_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    sections = re.split(r"^##+ ", page, flags=re.MULTILINE)[1:]
    for section in sections:
        title, _, text = section.partition("\n")
        if not text.strip() or title == "Look first":
            continue
        named = re.findall(r"<!-- shown by: (.+?) -->", text, re.DOTALL)
        assert named, title
        for name in re.findall(r"\w+", " ".join(named)):
            assert re.search(rf"def {name}\b", code), (title, name)


def test_command_says_so_where_there_is_no_store(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ape_integrations.cli", "stats", "--cache-dir", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "There is no store in" in done.stderr
