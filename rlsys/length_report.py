"""What the pairs of a preference stage are: how long both sides are and how far apart, as numbers and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.pair_tokens import PairRollouts

_QUANTILES = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
_CHOSEN, _REJECTED, _GAP = "#2a6fbb", "#d9822b", "#4d4d4d"


def write_report(folder: Path, pairs: Sequence[PairRollouts], counts: Mapping[str, int]) -> dict[str, Any]:
    """Write `report.json` and `lengths.png` into the folder; returns what the former says.

    Lengths are the trained tokens of an answer: what the policy writes, with the end of the turn.
    """
    chosen, rejected = (
        np.array([side.num_trained_tokens for side in sides], np.float64)
        for sides in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    report = {
        "pairs": len(pairs),
        "prompts": len({pair.prompt for pair in pairs}),
        "counts": dict(counts),
        "lengths": {"chosen": _summary(chosen), "rejected": _summary(rejected)},
        "gap": {
            "difference": _summary(chosen - rejected),
            "ratio": _summary(chosen / rejected),
            "share_with_longer_chosen": float((chosen > rejected).mean()),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "report.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, folder / "report.json")
    plot_lengths(folder / "lengths.png", chosen, rejected)
    return report


def _summary(values: NDArray[np.float64]) -> dict[str, float]:
    found = {name: float(np.percentile(values, share)) for name, share in _QUANTILES.items()}
    return {"mean": float(values.mean()), **found}


def plot_lengths(path: Path, chosen: NDArray[np.float64], rejected: NDArray[np.float64]) -> None:
    """Both distributions of lengths, and those of their difference and ratio, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    bins, scale = _bins(np.concatenate([chosen, rejected]))
    for values, label, colour in ((rejected, "rejected", _REJECTED), (chosen, "chosen", _CHOSEN)):
        axes[0].hist(values, bins=bins, color=colour, alpha=0.55, label=f"{label}, median {np.median(values):,.0f}")
        axes[0].axvline(np.median(values), color=colour, linewidth=1.8)
    axes[0].set(title="length of an answer", xlabel="trained tokens", ylabel="pairs", xscale=scale)
    axes[0].legend(fontsize=9)
    _gap(axes[1], chosen - rejected, "chosen - rejected", "tokens", zero=0.0)
    _gap(axes[2], chosen / rejected, "chosen / rejected", "ratio", zero=1.0)
    for axis in axes:
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend above the bars
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.grid(alpha=0.25, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(chosen):,} pairs; the chosen answer is longer in {(chosen > rejected).mean():.0%}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _gap(axis: Any, values: NDArray[np.float64], title: str, unit: str, *, zero: float) -> None:
    """One distribution of how far apart the sides are, with its median and where both are equally long."""
    bins, scale = _bins(values)
    axis.hist(values, bins=bins, color=_GAP, alpha=0.7)
    low, high = axis.get_xlim()
    if low <= zero <= high:
        axis.axvline(zero, color="black", linestyle=":", linewidth=1.2, label="equally long")
    median = float(np.median(values))
    axis.axvline(median, color="#b3262a", linewidth=1.8, label=f"median {median:,.2f}".rstrip("0").rstrip("."))
    axis.set(title=title, xlabel=unit, ylabel="pairs", xscale=scale)
    axis.legend(fontsize=9)


def _bins(values: NDArray[np.float64]) -> tuple[Any, str]:
    """Edges of up to 40 bins, as wide as their scale asks: logarithmic where lengths span more than a factor of 20."""
    low, high = float(values.min()), float(values.max())
    count = int(np.clip(2 * np.sqrt(len(values)), 5, 40))
    if low > 0 and high / low > 20:
        return np.geomspace(low, high * (1 + 1e-9), count + 1, dtype=np.float64), "log"
    if high - low < 1e-9:
        return np.array([low - 0.5, low + 0.5]), "linear"
    whole = bool((values == np.round(values)).all())
    if whole and high - low < count:  # one bin for each whole number
        return np.arange(low - 0.5, high + 1.0), "linear"
    return np.linspace(low, high, count + 1), "linear"
