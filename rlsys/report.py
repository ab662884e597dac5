"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlsys.records import RunDirectory


def plot_curves(directory: RunDirectory) -> None:
    """Write `curves.png` from `metrics.jsonl`; nothing where the run has not taken an RL step."""
    lines = directory.metrics("rl")
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held_out = directory.metrics("rl/eval")
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), constrained_layout=True)
    steps = [line["step"] for line in lines]

    def draw(axis: Any, names: Sequence[tuple[str, str]], title: str) -> None:
        for key, label in names:
            axis.plot(steps, [line.get(key, float("nan")) for line in lines], label=label, linewidth=1.4)
        axis.set(title=title, xlabel="policy step")
        axis.grid(alpha=0.3)

    draw(axes[0, 0], [("accuracy", "training problems")], "accuracy")
    axes[0, 0].plot([e["step"] for e in held_out], [e["accuracy"] for e in held_out], "o--", label="held-out problems")
    draw(axes[0, 1], [("tool_rate", "rollouts that call"), ("tool_error_rate", "calls that fail")], "tool use")
    draw(axes[0, 2], [("response_tokens", "mean")], "tokens written per rollout")
    draw(
        axes[1, 0], [("learner/logprob_gap", "mean"), ("learner/logprob_gap_max", "largest")], "log-prob gap to engine"
    )
    axes[1, 0].set_yscale("log")
    draw(axes[1, 1], [("learner/entropy", "entropy"), ("learner/grad_norm", "gradient norm")], "policy")
    measured = {name for line in lines for name in line}
    phases = [name for name in ("rollout", "learn", "publish", "record", "eval") if f"seconds/{name}" in measured]
    axes[1, 2].stackplot(steps, [[line.get(f"seconds/{p}", 0.0) for line in lines] for p in phases], labels=phases)
    axes[1, 2].set(title="seconds per step", xlabel="policy step")
    for axis in axes.flat:
        axis.legend(fontsize=8)
    for axis in (axes[0, 0], axes[0, 1]):
        axis.set_ylim(-0.03, 1.03)
    figure.suptitle(directory.folder.name)
    figure.savefig(directory.folder / "curves.png", dpi=110)
    plt.close(figure)
