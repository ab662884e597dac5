"""What became better or worse from iteration to iteration, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.records import RunDirectory

_PANELS: Sequence[tuple[str, Mapping[str, str]]] = (
    ("accuracy", {"held_out_accuracy": "held-out", "validation_accuracy": "validation", "accuracy": "learned from"}),
    ("the judge's score", {"held_out_score": "held-out", "validation_score": "validation", "score": "learned from"}),
    (
        "tokens of the answers learned from",
        {"thought_tokens": "thought", "shown_tokens": "response", "answer_tokens": "both"},
    ),
    ("length of judged pairs, tokens", {"chosen_length": "chosen", "rejected_length": "rejected"}),
    ("shares", {"thought_parse_failure": "parse failures", "length_weight": "weight of length"}),
    ("problems", {"problems": "all", "pairs": "with a pair", "pairs_with_parse_failure": "rejected: parse failure"}),
)


def plot_iterations(directory: RunDirectory) -> None:
    """Write `tpo/iterations.png` from the lines of the stage; iteration 0 is the model that it began with."""
    lines = directory.metrics("tpo")
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, names) in zip(axes.flat, _PANELS, strict=True):
        _draw(axis, lines, names)
        axis.set(title=title, xlabel="iteration")
        axis.set_xticks([line["step"] for line in lines])
        low, high = axis.get_ylim()
        axis.set_ylim(min(0.0, low), high + 0.1 * abs(high))
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.suptitle(directory.folder.name)
    folder = directory.stage("tpo")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "iterations.png", dpi=110)
    plt.close(figure)


def _draw(axis: Any, lines: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
    for key, label in names.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=label, linewidth=1.4, markersize=4)
