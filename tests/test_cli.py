"""The commands that look at a machine and at its sandbox."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from rlsys.cli import app


def test_doctor_tries_every_tier_and_says_what_it_found() -> None:
    outcome = CliRunner().invoke(app, ["doctor"])
    tiers = [f"Python tool, {tier}" for tier in ("T2", "T1", "T0")]
    for what in ("Python", "cores", "torch", "vllm", "ray", "GPUs", *tiers):
        assert what in outcome.output
    assert outcome.exit_code == ("not here" in outcome.output and "allow user namespaces" in outcome.output)


def test_the_prompt_keeps_variables_shows_errors_and_ends_with_the_input() -> None:
    lines = "x = 20\nfor i in range(2):\n    x += 1\n\nx\n1 / 0\nprint('\n'.join(['still', 'here']))\n"
    outcome = CliRunner().invoke(app, ["tool", "python", "--option", "timeout_seconds=5"], input=lines)
    assert outcome.exit_code == 0, outcome.output
    assert re.search(r"Isolation: T\d", outcome.output)
    assert "22" in outcome.output
    assert "ZeroDivisionError" in outcome.output
    assert "SyntaxError" in outcome.output  # the text literal that the line break has cut
