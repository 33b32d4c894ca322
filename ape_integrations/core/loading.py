"""Loading models and tokenizers by name, for everybody who does."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ape_integrations.errors import APEError, ConfigError
from ape_integrations.models import DEMO_MODEL_NAME, demo_model_path

logger = logging.getLogger(__name__)

_told = threading.Event()

#: Held while a model is loaded or attached: transformers changes torch's defaults and how modules
#: are initialised meanwhile, for all threads.
loading_lock = threading.RLock()

#: Arguments of ``from_pretrained()`` that say where files come from, whatever is loaded from them.
_PLACE = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "gguf_file")


def bundled_model() -> str:
    """Return the bundled demo model's path, and say once per process that it is used."""
    if not _told.is_set():
        _told.set()
        logger.warning(
            "No model was named: the bundled demo model %s answers. It is small and made for "
            "trying things out; name a model for real work.",
            DEMO_MODEL_NAME,
        )
    return demo_model_path()


def place_of(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments for loading a model that hold for its config and tokenizer too."""
    return {name: model_kwargs[name] for name in _PLACE if name in model_kwargs}


def usable_device_map(device_map: Any) -> Any:
    """Return what to pass on as ``device_map``; "auto" means nothing on a bare CPU.

    Placing a model needs the package accelerate. Without it the model stays on the CPU, which is
    said.
    """
    if device_map != "auto":
        return device_map
    import torch

    if not torch.accelerator.is_available():
        return None
    if importlib.util.find_spec("accelerate") is None:
        logger.warning(
            "The model stays on the CPU although there is an accelerator: transformers needs the "
            "package accelerate to place it (pip install accelerate). Or pass a loaded model."
        )
        return None
    return "auto"


@contextmanager
def clear_loading_errors(name: str) -> Iterator[None]:
    """Say in one sentence what transformers says in a page when a name leads nowhere.

    Raises
    ------
    ConfigError
        Instead of ``OSError`` and ``ValueError``.
    """
    try:
        yield
    except APEError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"Cannot load {name!r}: {reason} Name a directory that holds config.json, weights and "
            "tokenizer, or a model of the Hugging Face Hub that this machine can reach."
        ) from error
