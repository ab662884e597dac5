"""Every algorithm of the README on the quickstart's task, from the same fine-tuned model.

    make quickstart && python -m benchmarks.algorithms

Each is one run of `configs/quickstart.yaml` with only its `rl` stage, of 20 policy steps where the quickstart has 40,
from the model that the quickstart's fine-tuning left; the settings are those of the README's table, all else (learning
rate, problems, seed) is the same. Nothing is tuned for any of them: the table shows that each one learns, not which one
is best. One seed; a held-out accuracy from 256 problems has a standard error of about 3 points.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import common
from benchmarks.common import must, say

ROOT = Path(__file__).parents[1]
_ROW = re.compile(r"^\| ([^|]+) \| (?:the defaults|`(rl\.[^`]+)`) \|$", re.MULTILINE)


def algorithms() -> dict[str, list[str]]:
    """Name and settings of every row of the README's table."""
    readme = (ROOT / "README.md").read_text()
    return {name.strip(): settings.split() for name, settings in _ROW.findall(readme)}


def run(name: str, settings: list[str], steps: int, model: Path, folder: Path) -> dict[str, Any]:
    """One run; its rewards step by step and its summary."""
    overrides = ["stages=[rl]", "model.scratch=null", f"model.path={model}", f"run_dir={folder}", f"rl.steps={steps}"]
    overrides += settings
    command = [sys.executable, "-m", "rlsys", "train", "configs/quickstart.yaml", *overrides, "--fresh"]
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    must(code == 0, f"{name} ended with exit code {code}; see {folder}.log")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if line["stage"] == "rl" and "seconds/step" in line]
    summary = json.loads((folder / "summary.json").read_text())
    return {"settings": settings, "rewards": rewards, "summary": summary}


def main() -> None:
    """Run all, print the table, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/quickstart/sft/model", help="where all begin")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/algorithms", help="where the runs go")
    parser.add_argument("--steps", type=int, default=20, help="policy steps of each run, at least 20")
    parser.add_argument("--name", help="write results/NAME.json instead of the usual name")
    options = parser.parse_args()
    if not options.model.exists():
        raise SystemExit(f"no model at {options.model}; `make quickstart` makes it")
    options.runs.mkdir(parents=True, exist_ok=True)
    found = {}
    last = f"{options.steps - 4}-{options.steps}"
    say(f"| algorithm | reward in steps 1-5 | 9-13 | {last} | held-out before | after |")
    say("|---|---|---|---|---|---|")
    for number, (name, settings) in enumerate(algorithms().items()):
        result = run(name, settings, options.steps, options.model, options.runs / str(number))
        found[name] = result
        curve = " | ".join(f"{mean(result['rewards'][end - 5 : end]):.2f}" for end in (5, 13, options.steps))
        before, after = (result["summary"][key] for key in ("accuracy_before", "accuracy_after"))
        say(f"| {name} | {curve} | {before:.3f} | {after:.3f} |")
    common.write("algorithms", options, {"algorithms": found})


if __name__ == "__main__":
    main()
