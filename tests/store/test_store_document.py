from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_document_names_exists():
    document = (HERE.parents[1] / "docs" / "store.md").read_text()
    code = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    named = set(re.findall(r"\btest_\w+(?!\w|\.py)", document))
    files = set(re.findall(r"\b(test_\w+)\.py", document))
    missing = {
        name
        for name in named - files
        if f"def {name}(" not in code and not (name.endswith("_") and f"def {name}" in code)
    }
    assert not missing
    assert all((HERE / f"{name}.py").exists() for name in files)
    assert len(named) > 30
