"""No public name without a docstring, and none whose docstring disagrees with its signature."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import pytest

import ape_integrations
from ape_integrations import store

PACKAGE = Path(ape_integrations.__file__).parent

#: Names that users import, whose docstrings must describe every parameter.
EXPORTED = sorted({*ape_integrations.__all__, *store.__all__} - {"__version__"})


@cache
def package() -> Any:
    return griffe.load("ape_integrations", search_paths=[str(PACKAGE.parent)])


def public(parent: Any) -> Iterator[Any]:
    """Yield everything below a module or class that has no underscore in front."""
    for name, member in parent.members.items():
        if name.startswith("_") or member.is_alias:
            continue
        yield member
        if member.is_module or member.is_class:
            yield from public(member)


def described(thing: Any) -> bool:
    """Whether it has a docstring, or takes that of what it overrides or stands in for."""
    if thing.has_docstring or (thing.is_attribute and not _needs_words(thing)):
        return True
    if thing.is_function and thing.parent.is_class:
        return any("overload" in str(one.value) for one in thing.decorators)
    return False


def _needs_words(attribute: Any) -> bool:
    """Whether an attribute is a property; what a class or module holds is told by its docstring."""
    return "property" in attribute.labels


def test_every_public_name_has_a_docstring() -> None:
    bare = [thing.path for thing in public(package()) if not described(thing)]
    assert not bare, bare


def parameters(thing: Any) -> list[str]:
    """Return the names that a caller may pass."""
    if thing.is_class:
        return [one.name for one in thing.parameters][1:] or _fields(thing)
    names = [one.name for one in thing.parameters]
    return [name for name in names if name not in ("self", "cls")]


def _fields(cls: Any) -> list[str]:
    """Return the fields of a class that makes its own ``__init__`` of them."""
    return [name for name, one in cls.members.items() if one.is_attribute and one.annotation]


def named(docstring: str) -> set[str]:
    """Return the names of a numpy-style section of parameters."""
    sections = re.findall(
        r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", docstring, re.M | re.S
    )
    heads = re.findall(r"^(\S[^\n:]*?)(?: :.*)?$", "\n".join(sections), re.M)
    return {name.strip(" *") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("name", EXPORTED)
def test_parameters_of_exported_classes_and_functions_are_described(name: str) -> None:
    home = package()[name] if name in ape_integrations.__all__ else package()["store"][name]
    thing = home.final_target if home.is_alias else home
    if not (thing.is_class or thing.is_function):
        return
    known = named(thing.docstring.value)
    constructor = thing.members.get("__init__") if thing.is_class else None
    if not thing.is_class or (constructor is not None and constructor.is_function):
        assert not set(parameters(thing)) - known - {"kwargs", "args"}, name
    if thing.is_class:
        missing = [path for path in _methods_without_words(thing)]
        assert not missing, missing


def _methods_without_words(cls: Any) -> Iterator[str]:
    """Yield parameters of public methods that neither a section nor a sentence mentions."""
    for method in public(cls):
        if not method.is_function or not method.has_docstring:
            continue
        text = method.docstring.value
        known = named(text)
        refers = re.search(r"\bas for\b|\bsee\b|\bas calling\b|\bas `|otherwise like", text, re.I)
        for parameter in parameters(method):
            mentioned = parameter in known or re.search(rf"\b{parameter}\b", text)
            obvious = len(parameters(method)) == 1 or parameter in ("kwargs", "args")
            if not (mentioned or refers or obvious):
                yield f"{method.path}({parameter})"


def test_documented_parameters_exist() -> None:
    """A section of parameters names nothing that cannot be passed."""
    wrong = []
    for thing in public(package()):
        if thing.is_function and thing.has_docstring:
            passed = set(parameters(thing))
            wrong += [
                f"{thing.path}({name})"
                for name in named(thing.docstring.value) - passed
                if name.isidentifier() and "Attributes\n" not in thing.docstring.value
            ]
    assert not wrong, wrong


def test_the_walk_finds_what_has_no_docstring(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(
        '"""A module."""\n\ndef bare(): ...\n\nclass Told:\n    """A class."""\n\n'
        "    def bare(self): ...\n\n    @property\n    def value(self): ...\n",
        encoding="utf-8",
    )
    sample: Any = griffe.load("sample", search_paths=[str(tmp_path)])
    bare = {thing.path for thing in public(sample) if not described(thing)}
    assert bare == {"sample.bare", "sample.Told.bare", "sample.Told.value"}


def test_every_module_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
