"""The package as it is installed and imported."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import ape_integrations

ROOT = Path(__file__).parents[1]

_FROM_WHEEL = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import ape_integrations
from ape_integrations import APEGenerator, MemoryKVStore
from ape_integrations.models import demo_model_path

generator = APEGenerator.from_pretrained(demo_model_path(), store=MemoryKVStore())
result = generator.generate("", ["One text.", "Another text."], "A question?", max_new_tokens=4)
print(json.dumps([ape_integrations.__file__, demo_model_path(), result.cache["misses"]]))
"""

_IMPORT = """
import sys
import ape_integrations
heavy = {"torch", "transformers", "llama_index", "langchain_core", "diskcache", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""

_WITHOUT_FRAMEWORKS = """
import sys
for name in ("llama_index", "llama_index.core", "langchain_core"):
    sys.modules[name] = None
import ape_integrations
ape_integrations.APEGenerator, ape_integrations.DiskKVStore
for name, extra in (("APELLM", "llama-index"), ("ChatAPE", "langchain")):
    try:
        getattr(ape_integrations, name)
    except ape_integrations.APEError as error:
        assert f"ape-integrations[{extra}]" in str(error), error
        assert isinstance(error, ImportError)
    else:
        raise AssertionError(name)
"""


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_model_and_answers_without_a_network(tmp_path: Path) -> None:
    """Built, unpacked elsewhere, and used with every connection refused."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    output = _python(_FROM_WHEEL, PYTHONPATH=str(site), HF_HUB_OFFLINE="1", HOME=str(tmp_path))
    package, model, misses = json.loads(output.splitlines()[-1])
    assert package.startswith(str(site))
    assert model.startswith(str(site))
    assert misses == 2


def test_import_loads_neither_torch_nor_a_framework() -> None:
    _python(_IMPORT)


def test_missing_framework_is_named_with_its_extra() -> None:
    _python(_WITHOUT_FRAMEWORKS)


def test_every_public_name_exists_and_is_described() -> None:
    for name in ape_integrations.__all__:
        value = getattr(ape_integrations, name)
        if inspect.isclass(value):
            assert inspect.getdoc(value), name
            for method, function in vars(value).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(function), f"{name}.{method}"


def test_unknown_public_name_is_an_attribute_error() -> None:
    assert not hasattr(ape_integrations, "APENothing")
