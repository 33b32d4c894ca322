"""Turn published data sets into files for `ape-integrations eval --data`.

    python tools/public_data.py nq nq-open-oracle.jsonl.gz --documents 8 > nq-8.jsonl
    python tools/public_data.py sst2 train.tsv dev.tsv --examples 16 > sst2-16.jsonl

The first file is the one with the relevant passages of Natural Questions that comes with "Lost in
the Middle" (nelson-liu/lost-in-the-middle, qa_data/); the others of a question are what BM25
finds for it among the relevant passages of all other questions. The second are SST-2's sentences, a
tab and their label.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import bm25s

LABELS = ("negative", "positive")

T = TypeVar("T")


def natural_questions(
    path: Path, documents: int, count: int, random_: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield questions with their relevant passage at a random place among other passages.

    Parameters
    ----------
    path : Path
        Gzipped JSON Lines with ``question``, ``answers`` and ``ctxs``.
    documents : int
        Passages per question. None but the relevant one holds an accepted answer.
    count : int
        Questions to draw.
    random_ : random.Random
        Draws questions and places.

    Raises
    ------
    ValueError
        There are fewer questions.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    # Where the annotators' answer is not in the passage, nobody could find it there.
    questions = [each for each in questions if each["ctxs"][0]["hasanswer"]]
    passages = [f"{each['ctxs'][0]['title']}\n{each['ctxs'][0]['text']}" for each in questions]
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
    for number in _sample(range(len(questions)), count, "--count", random_):
        question = questions[number]
        tokens = bm25s.tokenize(question["question"], show_progress=False)
        ranked, _ = retriever.retrieve(tokens, k=min(100, len(passages)), show_progress=False)
        answers = [answer.lower() for answer in question["answers"]]
        found = [
            passages[other]
            for other in ranked[0]
            if not any(answer in passages[other].lower() for answer in answers)
        ]
        contexts = list(dict.fromkeys(found))[: documents - 1]
        contexts.insert(random_.randrange(documents), passages[number])
        yield {
            "question": question["question"].capitalize().rstrip("?") + "?",
            "contexts": contexts,
            "answers": question["answers"],
        }


def sst2(
    train: Path, dev: Path, examples: int, count: int, random_: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield sentences to label, each with its own examples, as many of one label as of the other.

    Parameters
    ----------
    train, dev : Path
        Tab-separated sentences and labels; examples come from the first.
    examples : int
        Examples per sentence.
    count : int
        Sentences to draw.
    random_ : random.Random
        Draws sentences and examples.

    Raises
    ------
    ValueError
        There are fewer sentences or examples.
    """
    pool: dict[str, list[str]] = {"0": [], "1": []}
    for sentence, label in _rows(train):
        pool[label].append(sentence)
    for sentence, label in _sample(list(_rows(dev)), count, "--count", random_):
        drawn = [
            {"input": text, "output": name}
            for name, texts in zip(LABELS, pool.values(), strict=True)
            for text in _sample(texts, examples // 2, "--examples", random_)
        ]
        random_.shuffle(drawn)
        yield {"examples": drawn, "input": sentence, "answers": [LABELS[int(label)]]}


def _sample(items: Sequence[T], count: int, option: str, random_: random.Random) -> list[T]:
    if count > len(items):
        raise ValueError(f"there are {len(items)} to draw {count} from: lower {option}")
    return random_.sample(items, count)


def _rows(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def main(argv: Sequence[str] | None = None) -> None:
    """Print JSON Lines."""
    parser = argparse.ArgumentParser(description="Records of published data sets.")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, default=200)
    kinds = parser.add_subparsers(required=True)
    questions = kinds.add_parser("nq", help="Natural Questions with passages of other questions")
    questions.add_argument("path", type=Path)
    questions.add_argument("--documents", type=int, default=8)
    questions.set_defaults(
        draw=lambda given, random_: natural_questions(
            given.path, given.documents, given.count, random_
        )
    )
    sentences = kinds.add_parser("sst2", help="sentiment of sentences, with examples")
    sentences.add_argument("train", type=Path)
    sentences.add_argument("dev", type=Path)
    sentences.add_argument("--examples", type=int, default=16)
    sentences.set_defaults(
        draw=lambda given, random_: sst2(
            given.train, given.dev, given.examples, given.count, random_
        )
    )
    given = parser.parse_args(argv)
    if min(given.count, getattr(given, "documents", 1), getattr(given, "examples", 2) // 2) < 1:
        parser.error("--count and --documents must be at least 1, --examples at least 2")
    try:
        records = list(given.draw(given, random.Random(given.seed)))
    except (OSError, EOFError) as error:
        parser.error(f"cannot read the data set: {error}")
    except ValueError as error:
        parser.error(str(error))
    except (KeyError, IndexError, TypeError) as error:
        parser.error(f"this is not the data set that the tool is made for: {error!r}")
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
