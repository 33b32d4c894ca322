"""The accelerator path, on a simulated device (:mod:`tests.devices.simulation`).

The checks are in ``simulated.py`` and run in a process of their own, because torch never forgets a
device that was registered with it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch that takes a device written in Python",
)

CHECKS = Path(__file__).with_name("simulated.py")


def run(marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", marker, str(CHECKS)],
        cwd=CHECKS.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


def test_models_answer_alike_on_a_device() -> None:
    run("not stress")


@pytest.mark.stress
def test_all_families_answer_alike_on_a_device() -> None:
    run("stress")
