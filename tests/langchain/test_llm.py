"""APELanguageModel: completions on the same engine."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from ape_integrations import APELanguageModel, MemoryKVStore
from tests.langchain.helpers import QUESTIONS, TEXTS, loaded_model, loaded_tokenizer


def completion(**kwargs: Any) -> APELanguageModel:
    settings = {"temperature": 0, "max_tokens": 8, "store": MemoryKVStore(), **kwargs}
    return APELanguageModel(model=loaded_model(), tokenizer=loaded_tokenizer(), **settings)


def test_prompt_is_continued_as_it_is() -> None:
    tokenizer = loaded_tokenizer()
    prompt = tokenizer("Aldor is", return_tensors="pt", return_token_type_ids=False)
    output = loaded_model().generate(**prompt, do_sample=False, max_new_tokens=8)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert completion().invoke("Aldor is") == answer


def test_every_way_of_asking_gives_the_same_text() -> None:
    model = completion()
    expected = [model.invoke(question) for question in QUESTIONS]
    assert model.batch(list(QUESTIONS)) == expected
    assert ["".join(model.stream(question)) for question in QUESTIONS] == expected
    assert asyncio.run(model.abatch(list(QUESTIONS))) == expected

    async def read(question: str) -> str:
        return "".join([piece async for piece in model.astream(question)])

    assert asyncio.run(read(QUESTIONS[0])) == expected[0]


def test_generation_info_carries_usage_and_what_the_cache_did() -> None:
    model = completion()
    model.generator.registry.register(TEXTS[:2])
    prompt = f"Read:\n\n{TEXTS[0]}\n\n{TEXTS[1]}\n\nSo Aldor is"
    results = [model.generate([prompt]) for _ in range(2)]
    infos = [result.generations[0][0].generation_info or {} for result in results]
    assert [info["ape"]["hits"] for info in infos] == [0, 2]
    assert infos[0]["model_name"] == "llama" and infos[0]["finish_reason"] == "length"
    assert infos[0]["usage_metadata"]["output_tokens"] == 8
    assert results[0].llm_output is not None
    assert results[0].llm_output["token_usage"]["completion_tokens"] == 8


def test_stream_tells_callbacks_and_ends_with_the_info() -> None:
    class Listener(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens = ""
            self.info: dict[str, Any] = {}

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.tokens += token

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            self.info = response.generations[0][0].generation_info

    listener = Listener()
    text = "".join(completion().stream("Aldor is", {"callbacks": [listener]}))
    assert listener.tokens == text
    assert listener.info["ape"]["contexts"] == 0


def test_arguments_of_a_call_go_before_fields() -> None:
    model = completion(stop=["q"])
    assert len(model.invoke("Aldor is", max_tokens=3)) <= 3
    text = completion().invoke("Aldor is")
    assert completion().bind(stop=[text[2]]).invoke("Aldor is") == text[: text.index(text[2])]


def test_traces_and_token_counts_are_the_models_own() -> None:
    model = completion()
    params = model._get_ls_params()
    assert params["ls_provider"] == "ape" and params["ls_model_name"] == "llama"
    assert model.get_num_tokens("Aldor") == 5
    assert model._identifying_params["temperature"] == 0
