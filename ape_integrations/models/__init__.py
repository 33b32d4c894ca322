"""The bundled demo model: a small causal LM that answers questions from its context.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEMO_MODEL_NAME", "demo_model_path"]

DEMO_MODEL_NAME = "tiny-reader"


def demo_model_path() -> str:
    """Return the folder of the bundled model, in Hugging Face format.

    Returns
    -------
    str
        A path that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``
        take; no network is needed.

    Raises
    ------
    FileNotFoundError
        If the weights are not there: the package was installed without its data files.
    """
    folder = Path(__file__).parent / DEMO_MODEL_NAME
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the bundled model is missing from {folder}: install the wheel or a full checkout, "
            "or train it with tools/train_demo_model.py"
        )
    return str(folder)
