"""The results of an experiment as people read them: tables in the terminal and in Markdown, a picture, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rlsys.console import Console
from rlsys.reproduce.results import Finding, Results, to_json
from rlsys.reproduce.statistics import Estimate

_STYLES = {"as the paper": "green", "opposite": "red"}


def write(results: Results, folder: Path) -> None:
    """Write `NAME/table.md`, `NAME/table.json` and `NAME/plot.png`, and `table.md` of all experiments in `folder`."""
    own = folder / results.name
    own.mkdir(parents=True, exist_ok=True)
    (own / "table.md").write_text(to_markdown(results))
    (own / "table.json").write_text(json.dumps(to_json(results), indent=1) + "\n")
    plot(results, own / "plot.png")
    (folder / "table.md").write_text("\n".join(path.read_text() for path in sorted(folder.glob("*/table.md"))))


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    head, *rows = _measure_rows(results)
    table = Table(*head, title=f"{results.name}: {results.claim}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.rich.print(table)
    if results.findings:
        table = Table("the paper's claim", "difference", "came out", title="paired by seed", title_justify="left")
        for finding in results.findings:
            table.add_row(*_finding_row(results, finding), style=_STYLES.get(finding.verdict))
        console.rich.print(table)
    for line in results.paper:
        console.say(f"the paper: {line}")
    for failure in results.failures:
        console.say(f"failed: {failure.run}, seed {failure.seed}: {failure.message}")
    console.say(f"{results.wall_seconds:.0f} s of runs")


def to_markdown(results: Results) -> str:
    """The same as Markdown."""
    parts = [f"## {results.name}", results.claim, _markdown_table(_measure_rows(results))]
    if results.findings:
        head = ("the paper's claim", "difference, paired by seed", "came out")
        parts.append(_markdown_table([head, *(_finding_row(results, finding) for finding in results.findings)]))
    if results.paper:
        parts.append("\n".join(["The paper:", "", *(f"* {line}" for line in results.paper)]))
    if results.failures:
        lines = [f"* {failure.run}, seed {failure.seed}: {failure.message}" for failure in results.failures]
        parts.append("\n".join(["Failed:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _measure_rows(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("variant", *results.measures, "seeds")]
    for variant in results.values:
        found = [results.estimate(variant, measure) for measure in results.measures]
        count = max((one.count for one in found if one is not None), default=0)
        rows.append((variant, *map(_cell, found), str(count)))
    return rows


def _cell(found: Estimate | None) -> str:
    if found is None:
        return "-"
    digits = _digits(found.mean)
    return f"{found.mean:.{digits}f}" + (f" ± {found.half_width:.{digits}f}" if found.half_width is not None else "")


def _finding_row(results: Results, finding: Finding) -> tuple[str, str, str]:
    claim, found = f"{finding.measure}: {finding.better} > {finding.than}", finding.estimate
    whole = results.estimate(finding.better, finding.measure)
    if found is None or whole is None:
        return claim, "-", finding.verdict
    digits = _digits(whole.mean)  # as many as in the other table
    text = f"{found.mean:+.{digits}f}"
    if found.half_width is not None:
        ends = (found.mean - found.half_width, found.mean + found.half_width)
        text += f" [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"
    return claim, text, finding.verdict


def _digits(number: float) -> int:
    return 1 if abs(number) >= 10 else 3


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plot(results: Results, path: Path) -> None:
    """A panel for each measure: bars with 95 % intervals, the seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants, measures = list(results.values), results.measures
    height = 1.5 + 0.42 * len(variants)
    figure, axes = plt.subplots(
        1, len(measures), figsize=(2.2 + 2.7 * len(measures), height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        _draw(axis, results, variants, measure)
    axes[0][0].set_yticks(range(len(variants)), variants)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{results.name}: bars are means with 95 % intervals, dots are seeds", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, results: Results, variants: Sequence[str], measure: str) -> None:
    for row, variant in enumerate(variants):
        found = results.estimate(variant, measure)
        if found is None:
            continue
        axis.barh(row, found.mean, color=f"C{row % 10}", alpha=0.45, height=0.7)
        if found.half_width is not None:
            axis.errorbar(found.mean, row, xerr=found.half_width, color="black", capsize=3, linewidth=1.2)
        dots = list(results.values[variant][measure].values())
        axis.plot(dots, [row] * len(dots), "o", color="black", markersize=4, markerfacecolor="white")
    axis.set_title(measure, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.3)
