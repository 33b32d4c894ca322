"""The bundled model: small, offline, reads its context, takes any text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ape_integrations.evaluation import demo, world
from ape_integrations.evaluation.prompts import Case
from ape_integrations.models import DEMO_MODEL_NAME, demo_model_path

EXAMPLES = Path(__file__).parent.parent / "examples" / "data"
MAX_BYTES = 16_000_000
MAX_PARAMETERS = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    path = demo_model_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32", local_files_only=True).eval()


Answer = Callable[[world.Prompt | Case], str]


@pytest.fixture(scope="module")
def answer(model: Any, tokenizer: Any) -> Answer:
    """Return what sends a whole prompt through ``model.generate()``, greedily."""

    def answered(prompt: world.Prompt | Case) -> str:
        text = prompt.prefix + world.SEPARATOR.join(prompt.contexts) + prompt.query
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return str(text).strip()

    return answered


def example_documents() -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in sorted(EXAMPLES.glob("*.txt"))}


def example_questions() -> list[dict[str, Any]]:
    questions: list[dict[str, Any]] = json.loads((EXAMPLES / "questions.json").read_text())
    return questions


@pytest.mark.parametrize("module", ["ape_integrations", "ape_integrations.models"])
def test_import_does_not_load_the_model(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["False", "False"]


def test_model_loads_offline() -> None:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from ape_integrations.models import demo_model_path\n"
        "path = demo_model_path()\n"
        "AutoTokenizer.from_pretrained(path)\n"
        "print(type(AutoModelForCausalLM.from_pretrained(path)).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": "/nonexistent"},
    )
    assert done.stdout.split() == ["LlamaForCausalLM"]


def test_model_stays_small(model: Any) -> None:
    folder = Path(demo_model_path())
    assert folder.name == DEMO_MODEL_NAME
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    assert sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS


def test_model_takes_the_ordinary_llama_path(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert config.max_position_embeddings >= 8192
    assert model.generation_config.eos_token_id == config.eos_token_id
    assert model.generation_config.pad_token_id == config.pad_token_id


@pytest.mark.parametrize(
    ("kind", "documents", "least"),
    [
        ("single", 8, 9),
        ("unanswerable", 8, 8),
        ("two-hop", 8, 7),
        ("follow-up", 8, 8),
        ("few-shot", 12, 8),
    ],
)
def test_model_answers_held_out_questions_exactly(
    kind: str, documents: int, least: int, answer: Answer, tokenizer: Any
) -> None:
    cases = demo.draw_cases(tokenizer, kind, documents, 10, seed=11)
    assert sum(answer(case) in case.answers for case in cases) >= least


@pytest.mark.parametrize("style", ["chat_qa", "context_chat"])
def test_model_answers_the_example_questions(style: str, answer: Answer, tokenizer: Any) -> None:
    texts = example_documents()
    wrong = []
    for case in example_questions():
        if case.get("history") and style not in world.CHAT_STYLES:
            continue
        given = answer(example_prompt(case, texts, style, tokenizer))
        if given != case["answer"]:
            wrong.append((case["question"], given))
    assert not wrong


def example_prompt(
    case: dict[str, Any], texts: dict[str, str], style: str, tokenizer: Any
) -> world.Prompt:
    """Put the question's own documents among distractors, six in all, in a fixed order."""
    rng = random.Random(case["question"])
    others = [name for name in texts if name not in case["sources"]]
    names = [*case["sources"], *rng.sample(others, 6 - len(case["sources"]))]
    rng.shuffle(names)
    turns = [
        world.Turn(turn["question"], turn["answer"], "single") for turn in case.get("history", [])
    ]
    turns.append(world.Turn(case["question"], case["answer"], case["kind"]))
    render = world.chat_renderer(tokenizer)
    return world.build_prompt(style, [texts[name] for name in names], turns, render)


def test_example_documents_are_held_out_and_support_their_answers() -> None:
    texts = example_documents()
    assert 20 <= len(texts) <= 40
    for case in example_questions():
        assert set(case["sources"]) <= set(texts)
        for sentence in case["answer"].removesuffix(".").split(". "):
            if not sentence.endswith(world.REFUSAL.removesuffix(".")):
                known = " ".join(texts[name] for name in case["sources"])
                assert sentence[1:] in known
    for stem in (Path(name).stem for name in texts):
        words = [word.capitalize() for word in stem.split("_")]
        assert len(words) == 1 or world.is_held_out(*words)


def test_world_is_the_same_for_the_same_seed(tokenizer: Any) -> None:
    first = demo.draw_cases(tokenizer, "two-hop", 4, 5, seed=3)
    second = demo.draw_cases(tokenizer, "two-hop", 4, 5, seed=3)
    other = demo.draw_cases(tokenizer, "two-hop", 4, 5, seed=4)
    assert first == second
    assert first != other


def test_splits_share_no_name() -> None:
    for split, expected in (("train", False), ("held_out", True)):
        drawn = world.World(5, split)
        for document in drawn.documents(40):
            if document.kind != world.CITY:
                first, second = document.entity.split()
                assert world.is_held_out(first, second) is expected


def test_prompts_are_those_of_llama_index() -> None:
    chat_engine = pytest.importorskip("llama_index.core.chat_engine.context")
    chat_prompts = pytest.importorskip("llama_index.core.prompts.chat_prompts")
    default_prompts = pytest.importorskip("llama_index.core.prompts.default_prompts")

    def ours(template: str) -> str:
        return template.replace("{context}", "{context_str}").replace("{question}", "{query_str}")

    system, user = chat_prompts.CHAT_TEXT_QA_PROMPT.message_templates
    assert system.content == world.QA_SYSTEM
    assert user.content == ours(world.TEXT_QA) == default_prompts.DEFAULT_TEXT_QA_PROMPT_TMPL
    _, user = chat_prompts.CHAT_TREE_SUMMARIZE_PROMPT.message_templates
    assert user.content == ours(world.TREE_SUMMARIZE)
    assert ours(world.CONTEXT_CHAT) == chat_engine.DEFAULT_CONTEXT_TEMPLATE


TRICKY_TEXTS = (
    "",
    " ",
    "\n",
    " leading and trailing ",
    "two  spaces,\ta tab\r\nand a carriage return",
    "file_path: /data/people/ada_renn.txt",
    "(Ada) 'Ada' \u2018Ada\u2019 Ada's don't x1961 1961x",
    "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8 \U0001f642 \u0627\u0644\u0639 e\u0301",
    "\u00e9 a\u200db \x00 \x7f",
    "the tokenizer's own markers: \u2581 and \u2040",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # done\n",
)


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_tokenizer_gives_back_any_text(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_gives_back_random_text(tokenizer: Any) -> None:
    rng = random.Random(0)
    pieces = ["Ada", "lives", " ", "\n", "'", "-", "1961", "\u00e9", "\u65e5", "(", "_", ".", "\t"]
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_word_is_one_token_wherever_it_stands(tokenizer: Any) -> None:
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("Porto", "Porto.", "in Porto", "a\nPorto", "(Porto")
    ]
    assert all(ids[0][0] in other for other in ids)
    assert len(ids[0]) == 1


def test_plain_text_starts_with_bos_once(tokenizer: Any) -> None:
    ids = tokenizer("Ada lives in Porto.")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Ada?"}], tokenize=False)
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_chat_template_renders_every_role_verbatim(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": " one "},
        {"role": "system", "content": "two\n"},
        {"role": "user", "content": "three"},
        {"role": "user", "content": [{"type": "text", "text": "four"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "five"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|> one <|end|><|system|>two\n<|end|><|user|>three<|end|><|user|>four<|end|>"
        "<|assistant|><|end|><|tool|>five<|end|><|assistant|>"
    )
