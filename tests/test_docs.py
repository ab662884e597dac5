"""What the documents say: every YAML block can be meant, every link leads somewhere, every attempt is in its table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.plugins import check_options, resolve
from tests.rewards import tampering_code, tampering_judge, tampering_math

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


MADE_OF_SOMETHING = ("demonstrations", "pairs", "filters")
"""What is called with the training problems, or with samples, before its options."""


def plug_ins(node: Any, given: int = 0) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every mapping with a `use`, however deep, and how many arguments stand before its options."""
    if isinstance(node, Mapping):
        if isinstance(node.get("use"), str):
            yield node, given
        for key, value in node.items():
            yield from plug_ins(value, int(key in MADE_OF_SOMETHING))
    elif isinstance(node, list):
        for value in node:
            yield from plug_ins(value, given)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_plug_in_of_a_yaml_block_exists_and_has_these_options(document: Path) -> None:
    for block in BLOCK.findall(document.read_text()):
        for plug_in, given in plug_ins(yaml.safe_load(block)):
            if plug_in["use"].startswith("rlsys."):
                target, options = resolve(plug_in["use"], place=document.name), plug_in.get("options", {})
                check_options(target, options, place=f"{document.name}: {plug_in['use']}", given=given)


def anchors(path: Path) -> set[str]:
    """What headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text()):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{document.name} links {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} links {target}#{anchor}"


def test_every_attempt_is_in_the_table_and_none_is_rewarded() -> None:
    lines = (ROOT / "docs/tampering.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    tried = {("mathematics", name) for name, _, _ in tampering_math.ATTEMPTS}
    tried |= {("code", name) for name in [*tampering_code.WRONG, *tampering_code.WRONG_FUNCTIONS]}
    tried |= {("judge", name) for name, _ in tampering_judge.ATTEMPTS}
    assert {(row[0], row[1]) for row in rows} == tried
    assert len(tried) >= 60
    assert "correct" not in {row[2] for row in rows}
