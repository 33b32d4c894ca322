"""The pipelines of both examples, with the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ape_integrations.chatbot import Conversation, Library, Pipeline, Turn
from ape_integrations.chatbot.arguments import DEMO_TOP_K, TOP_K
from ape_integrations.chatbot.introduction import (
    NOTE_DEMO_FILES,
    NOTE_OTHER_FILES,
    example_questions,
    model_note,
)
from tests.chatbot.conftest import DATA, example_pipeline

PAGE = b"""<html><head><title>Verona</title><style>p {}</style></head><body>
<p>Verona lies on the Adige.</p><script>window.pwned = 1</script></body></html>"""

EXAMPLES = ("chatbot_llamaindex", "chatbot_langchain")
FRAGMENT = b"<table><tr><td>Riga</td><td>Graz</td></tr></table><script>window.pwned = 1</script>"


def pdf(text: str) -> bytes:
    """Return a PDF of one page with a line of text."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, offsets = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        body
        + b"xref\n0 6\n0000000000 65535 f \n"
        + table
        + b"trailer << /Root 1 0 R /Size 6 >>\nstartxref\n%d\n%%%%EOF" % len(body)
    )


@pytest.fixture(scope="module", params=EXAMPLES)
def pipeline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    built, _ = example_pipeline(request.param, tmp_path_factory.mktemp("store"))
    yield built
    built.generator.close()


@pytest.fixture
def conversation(pipeline: Pipeline, tmp_path: Path) -> Conversation:
    library = Library(pipeline, DATA, directory=tmp_path)
    library.start()
    assert library.wait(60)
    return Conversation(pipeline, library, 32)


def ask(conversation: Conversation, question: str, *, compare: bool = False) -> Turn:
    *_, turn = conversation.ask(question, compare=compare)
    assert turn.error == ""
    return turn


def test_warming_leaves_nothing_to_encode(conversation: Conversation) -> None:
    turn = ask(conversation, "Where is Argent Optics based?")
    assert "Geneva" in turn.answer
    assert turn.passages[0].source == "argent_optics.txt"
    assert turn.report["hits"] == turn.report["contexts"] == len(turn.passages)
    assert len(turn.passages) == len(conversation._library.passages)
    assert turn.report["misses"] == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_follow_up_reads_the_passage_it_is_about(name: str, tmp_path: Path) -> None:
    pipeline, _ = example_pipeline(name, tmp_path, "--top-k", "1")
    library = Library(pipeline, DATA, directory=tmp_path)
    library.start()
    assert library.wait(60)
    conversation = Conversation(pipeline, library, 32)
    first = ask(conversation, "Where does Otto Winter live?")
    turn = ask(conversation, "And which language does this person speak?")
    assert first.passages[0] in turn.passages
    assert first.question in turn.prompt
    assert turn.report["misses"] == 0
    pipeline.generator.close()


def test_comparing_runs_the_same_prompt_sequentially(
    conversation: Conversation, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, asked = pipeline.generator, []
    stream = generator.stream
    monkeypatch.setattr(
        generator,
        "stream",
        lambda *parts, **kwargs: asked.append(parts) or stream(*parts, **kwargs),
    )
    turn = ask(conversation, "What does Nimbus Works make?", compare=True)
    prefix, contexts, prompt = asked[-1]
    assert (prefix, contexts) == ("", ())
    assert all(passage.text in prompt for passage in turn.passages)
    assert turn.question in prompt
    assert turn.sequential is not None
    assert turn.sequential.first_token_seconds is not None
    assert "lenses" in turn.sequential.answer


def test_the_last_answer_can_be_compared_later_and_only_once(conversation: Conversation) -> None:
    turn = ask(conversation, "What does Nimbus Works make?")
    assert turn.sequential is None
    assert list(conversation.compare())
    assert turn.gain is not None
    assert not list(conversation.compare())


def test_stopping_ends_the_forward_passes(
    conversation: Conversation, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless(pipeline, monkeypatch)
    for turn in conversation.ask("Where is Argent Optics based?"):
        if len(turn.answer) > 10:
            conversation.stop()
    assert turn.state == "stopped"
    length = len(turn.answer)
    # A generation that went on would keep the library from warming.
    library = conversation._library
    with library._quiet:
        assert library._quiet.wait_for(lambda: library._answering == 0, timeout=10)
    assert len(turn.answer) == length
    assert turn.report == {}


def endless(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model go on until it is stopped."""
    generate = pipeline.generator.model.generate

    def long(*args: object, **kwargs: object) -> object:
        return generate(*args, **{**kwargs, "max_new_tokens": 4000, "min_new_tokens": 4000})

    monkeypatch.setattr(pipeline.generator.model, "generate", long)


def test_the_example_questions_are_answered(conversation: Conversation) -> None:
    listed = json.loads((DATA / "questions.json").read_text())
    answers = {one["question"]: one["answer"].rstrip(".") for one in listed}
    questions = example_questions(DATA)
    assert len(questions) == 6
    wrong = []
    for question in questions:
        conversation.clear()
        answer = ask(conversation, question).answer
        wrong += [] if answers[question] in answer else [(question, answer)]
    assert not wrong


def test_the_demo_s_short_documents_are_retrieved_in_larger_numbers(tmp_path: Path) -> None:
    for options, expected in (((), DEMO_TOP_K), ((str(tmp_path),), TOP_K), (("--top-k", "2"), 2)):
        _, arguments = example_pipeline("chatbot_llamaindex", tmp_path, *options)
        assert arguments.top_k == expected


def test_every_kind_of_file_is_read(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("Porto lies on the Douro.")
    (folder / "b.md").write_text("# Ghent\n\nGhent lies on the **Lys**.")
    (folder / "c.html").write_bytes(PAGE)
    (folder / "cc.htm").write_bytes(FRAGMENT)
    (folder / "d.pdf").write_bytes(pdf("Tampere lies on the Tammerkoski."))
    (folder / "e.pdf").write_bytes(b"%PDF-1.4 damaged")
    library = Library(pipeline, folder, directory=tmp_path / "cache")
    library.read()
    texts = {name: "" for name in library.files}
    for passage in library.passages:
        texts[passage.source] += passage.text
    assert texts["a.txt"] == "Porto lies on the Douro."
    assert "Ghent lies on the" in texts["b.md"]
    assert "Verona lies on the Adige." in texts["c.html"]
    assert texts["cc.htm"].split() == ["Riga", "Graz"]
    assert not any(hidden in texts["c.html"] for hidden in ("p {}", "window", "<"))
    assert texts["d.pdf"] == "Tampere lies on the Tammerkoski."
    assert library.passages[-1].title == "d.pdf, page 1"
    assert [problem.partition(":")[0] for problem in library.problems] == ["e.pdf"]


def test_the_page_says_what_the_bundled_model_cannot() -> None:
    assert model_note(None, demo_files=True) == NOTE_DEMO_FILES
    assert model_note(None, demo_files=False) == NOTE_OTHER_FILES
    assert "Start with --model" in NOTE_OTHER_FILES
    assert model_note("Qwen/Qwen2.5-0.5B-Instruct", demo_files=False) == ""


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"quickstart": true}]', "\x80"])
def test_a_folder_without_good_example_questions_has_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "questions.json").write_text(content, encoding="utf-8")
    assert example_questions(tmp_path) == []
