"""LangChain's own test suites for chat models, on the bundled model."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from ape_integrations import ChatAPE
from tests.models import byte_tokenizer, tiny_model

NO_TOOLS = "The bundled model cannot call tools: its chat template has no place for them."
NO_JSON = "The bundled model answers questions in a few words; it cannot write JSON."
TEXT_ONLY = "The bundled model reads text only."
NO_ENVIRONMENT = "ChatAPE reads no environment variables."
NOT_ON_THE_LIST = "LangChain revives only classes of its own list of integrations."


@functools.cache
def other_model() -> str:
    """Directory of a model that is not the bundled one."""
    directory = tempfile.mkdtemp(prefix="other-model-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    tiny_model(max_position_embeddings=2048).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def model_stays_loaded() -> Any:
    """Keep the generator that the models of all tests share alive between them."""
    chat = ChatAPE()
    assert chat.generator
    return chat


class TestChatAPEUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAPE

    @pytest.fixture(autouse=True)
    def say_why(self, request: pytest.FixtureRequest) -> None:
        reasons = {"test_init_from_env": NO_ENVIRONMENT, "test_serdes": NOT_ON_THE_LIST}
        if request.node.originalname in reasons:
            pytest.skip(reasons[request.node.originalname])


class TestChatAPEIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAPE

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # The bundled model has nothing to say to "how are you", and then says nothing.
        return {"model_kwargs": {"min_new_tokens": 1}}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def enable_vcr_tests(self) -> bool:
        return True  # nothing to record: a local model sends no requests

    @property
    def model_override_value(self) -> str:
        return other_model()

    @pytest.fixture(autouse=True)
    def say_why(self, request: pytest.FixtureRequest) -> None:
        """Skip what the bundled model cannot do, each with its reason."""
        name = request.node.originalname
        for fragment, reason in SKIPPED.items():
            if fragment in name:
                pytest.skip(reason)


SKIPPED = {
    "tool_choice": NO_TOOLS,
    "tool_calling": NO_TOOLS,
    "bind_runnables_as_tools": NO_TOOLS,
    "tool_message_histories": NO_TOOLS,
    "tool_message_error_status": NO_TOOLS,
    "unicode_tool_call": NO_TOOLS,
    "agent_loop": NO_TOOLS,
    "few_shot": NO_TOOLS,
    "structured": NO_JSON,
    "json_mode": NO_JSON,
    "pdf": TEXT_ONLY,
    "audio": TEXT_ONLY,
    "image": TEXT_ONLY,
    "anthropic_inputs": TEXT_ONLY,
}
