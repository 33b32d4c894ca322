"""Records are read in the shapes that data sets come in; a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.records import Record, read_records


def written(path: Path, *values: Any) -> Path:
    file = path / "data.jsonl"
    file.write_text("\n".join(json.dumps(value) for value in values) + "\n")
    return file


def only(path: Path, value: Any, **options: Any) -> Record:
    [record] = read_records(written(path, value), **options)
    return record


PLAIN = {"question": "Who sings?", "contexts": ["Ada sings.", "Bo welds."], "answers": ["Ada"]}


def test_plain_record_is_read_as_it_is(tmp_path: Path) -> None:
    assert only(tmp_path, PLAIN) == Record(
        "Who sings?", ("Ada sings.", "Bo welds."), ("Ada",), False
    )


def test_strings_stand_for_lists_and_other_fields_are_left_alone(tmp_path: Path) -> None:
    value = {"question": "Who?", "contexts": "Ada sings.", "answers": "Ada", "id": 3, "level": None}
    assert only(tmp_path, value) == Record("Who?", ("Ada sings.",), ("Ada",), False)


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [
        # HotpotQA as published, as on the Hub; MuSiQue; DPR; LangChain; LongBench's one string.
        ([["Ada", ["Ada sings.", " She does."]]], ("Ada\nAda sings. She does.",)),
        ({"title": ["Ada"], "sentences": [["Ada sings."]]}, ("Ada\nAda sings.",)),
        ([{"title": "Ada", "paragraph_text": "Ada sings."}], ("Ada\nAda sings.",)),
        ([{"title": "", "text": "Ada sings.", "score": 1.5}], ("Ada sings.",)),
        ([{"page_content": "Ada sings."}], ("Ada sings.",)),
        ("Passage 1:\nAda\n\nPassage 2:\nBo", ("Passage 1:\nAda", "Passage 2:\nBo")),
        (["Ada sings.", " ", ""], ("Ada sings.",)),
    ],
)
def test_contexts_of_common_data_sets(
    contexts: Any, expected: tuple[str, ...], tmp_path: Path
) -> None:
    value = {"question": "Who?", "context": contexts, "answer": "Ada"}
    assert only(tmp_path, value).contexts == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (72, ("72",)),
        (["a", "b"], ("a", "b")),
        ({"text": ["a"], "answer_start": [3]}, ("a",)),
        ({"value": "a", "aliases": ["b"], "type": "x"}, ("a", "b")),
    ],
)
def test_answers_of_common_data_sets(
    answers: Any, expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert only(tmp_path, {**PLAIN, "answers": answers}).answers == expected


@pytest.mark.parametrize(
    "example",
    [
        "Q: 1+1 A: 2",
        ["1+1", "2"],
        {"input": "1+1", "output": 2},
        {"question": "1+1", "answer": ["2", "two"]},
    ],
)
def test_examples_may_be_texts_pairs_or_objects(example: Any, tmp_path: Path) -> None:
    value = {"examples": [example], "input": "2+2", "answers": ["4"]}
    record = only(tmp_path, value, example="Q: {input} A: {output}")
    assert record == Record("2+2", ("Q: 1+1 A: 2",), ("4",), True)


def test_braces_of_an_input_are_not_filled_in(tmp_path: Path) -> None:
    value = {"examples": [["{output}", "x"]], "input": "y", "answers": ["z"]}
    assert only(tmp_path, value, example="{input}={output}").contexts == ("{output}=x",)


def test_array_file_and_blank_lines_are_read(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text(json.dumps([PLAIN, PLAIN], indent=1))
    assert len(read_records(array)) == 2
    lines = tmp_path / "b.jsonl"
    lines.write_text(f"\ufeff{json.dumps(PLAIN)}\r\n\r\n{json.dumps(PLAIN)}")
    assert len(read_records(lines)) == 2


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**PLAIN, "question": "Who\u2028sings?"}, ensure_ascii=False))
    assert read_records(file)[0].question == "Who\u2028sings?"


def test_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN, {"wrong": 1})
    assert len(read_records(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1], "an object is needed, not a list"),
        ({"contexts": ["a"], "answers": "b"}, "'question' is missing; there is contexts, answers"),
        ({"question": "a", "answers": "b"}, "'contexts' is missing"),
        ({**PLAIN, "contexts": ["", " "]}, "no context"),
        ({**PLAIN, "contexts": [3]}, "a context must be a string or hold a text, not a number"),
        ({**PLAIN, "question": ["a"]}, "question must be a string, not a list"),
        ({**PLAIN, "answers": []}, "no answer"),
        ({**PLAIN, "answers": {"x": 1}}, "neither text"),
        ({"examples": [3], "input": "a", "answers": "b"}, "an example must be"),
        ({"examples": [], "input": "a", "answers": "b"}, "no context"),
        ({"examples": [["a", []]], "input": "a", "answers": "b"}, "output of an example must hold"),
        (
            {**PLAIN, "contexts": {"title": ["Ada", "Bo"], "sentences": [["Ada sings."]]}},
            "title and sentences must be as many as each other, not 2 and 1",
        ),
    ],
)
def test_bad_record_is_named_by_its_line(value: Any, problem: str, tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN, value)
    with pytest.raises(ConfigError, match=f"data.jsonl, line 2: .*{problem}"):
        read_records(file)


def test_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PLAIN) + "\n\n{'question': 1}\n")
    with pytest.raises(ConfigError, match="line 3: not JSON"):
        read_records(file)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_values_too_deep_inside_each_other_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match="line 1: lists and objects stand too deep"):
        read_records(file)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no record"):
        read_records(tmp_path / "empty.jsonl")


def test_form_of_an_example_needs_both_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"{input} and {output}"):
        read_records(written(tmp_path, PLAIN), example="{input}")
