"""What the tests of the tools share: a server that runs code as SandboxFusion does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sandbox_url() -> Iterator[str]:
    """A live server; it ends with its standard input, so also where the tests are killed."""
    program = str(Path(__file__).with_name("sandbox_server.py"))
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == 0
