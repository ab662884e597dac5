"""The `rlsys` command."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole
from rich.table import Table

from rlsys.config import Config, RewardConfig
from rlsys.config_file import flatten, load_config, origins
from rlsys.errors import ConfigError, RlsysError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Reinforcement learning for reasoning models that call tools: Ray actors roll out with vLLM, a learner
group trains.

**Start here:** `rlsys train configs/quickstart.yaml` trains a small model on this machine, without a GPU.

Any setting can be changed on the command line: `rlsys train configs/quickstart.yaml rl.steps=10 actors.count=1`.
`rlsys config CONFIG` shows all of them, and where each value comes from.

A run writes `metrics.jsonl`, TensorBoard files, every rollout as Parquet, checkpoints, `curves.png`, `summary.json` and
a `model` folder that transformers and vLLM load.
""",
)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML file; configs/ has examples.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: section.key=value ...", show_default=False)
]

_Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew; an earlier run is kept beside it.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: _Resume = False,
    fresh: _Fresh = False,
) -> None:
    """Run the stages of CONFIG: supervised fine-tuning, reinforcement learning, evaluation."""
    from rlsys.run import train as run_training

    run_training(load_config(config, overrides or []), resume=resume, fresh=fresh)


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Model folder; by default what the run of CONFIG left.")] = None,
) -> None:
    """Measure a model on the held-out problems of CONFIG."""
    from rlsys.run import train as run_training

    loaded = load_config(config, overrides or [])
    run_training(_for_evaluation(loaded, model), fresh=True)


def _for_evaluation(config: Config, model: str | None) -> Config:
    """The same configuration with evaluation as its only stage, in a folder of its own."""
    left = Path(config.run_dir) / "model"
    path = model or (str(left) if left.exists() else config.model.path)
    if path is not None:
        config = replace(config, model=replace(config.model, path=path, scratch=None))
    return replace(config, stages=["eval"], run_dir=f"{config.run_dir}-eval")


@app.command("config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved CONFIG, and where each value comes from."""
    loaded = load_config(config, overrides or [])
    known = origins(config, overrides or [])
    table = Table("key", "value", "from", box=None, pad_edge=False)
    for key, value in flatten(loaded).items():
        origin = known.get(key, "default")
        text = str(value)
        shown = text if len(text) <= 60 else text[:57] + "..."
        table.add_row(key, shown, origin, style="dim" if origin == "default" else None)
    RichConsole().print(table)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="Address of the cluster's job server.")] = "http://127.0.0.1:8265",
    resume: _Resume = False,
    fresh: _Fresh = False,
    wait: Annotated[bool, typer.Option(help="Follow the log until the job ends.")] = True,
) -> None:
    """Run `rlsys train CONFIG` as a Ray job, with this folder as its working directory.

    A job runs in a temporary copy of the folder, so results need an absolute `run_dir` that outlives it. On this
    machine it is made absolute; for another cluster give a folder that its nodes share.
    """
    from rlsys.cluster import is_local, submit_job

    arguments = [str(config), *(overrides or []), *["--resume"] * resume, *["--fresh"] * fresh]
    run_dir = Path(load_config(config, overrides or []).run_dir)  # an error costs nothing here
    if not run_dir.is_absolute():
        if not is_local(address):
            raise ConfigError(
                f"run_dir is {str(run_dir)!r}, which would lie in the job's temporary folder at {address}; "
                "give an absolute path that the cluster's nodes share: run_dir=/shared/..."
            )
        arguments.append(f"run_dir={run_dir.absolute()}")
    raise typer.Exit(submit_job(arguments, address=address, wait=wait))


@app.command()
def simulate(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; with --fit by default that of the run.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Rollout workers (actors.count).", min=1)] = None,
    learner_gpus: Annotated[int | None, typer.Option(help="Learner ranks (learners.count).", min=1)] = None,
    faults: Annotated[float | None, typer.Option(help="Mean hours between two deaths of one worker.")] = None,
    steps: Annotated[int | None, typer.Option(help="Policy steps; 20, or as many as the run of --fit.", min=1)] = None,
    fit: Annotated[Path | None, typer.Option(help="Take the models' numbers from this run's directory.")] = None,
) -> None:
    """Predict a run of CONFIG in virtual time: the real loop and fleet on modelled engines, learners and networks.

    What is printed is simulated, never measured. The models' numbers are the section `simulate` of CONFIG, or with
    --fit those of a real run; without CONFIG that run itself is simulated and compared with what it measured.
    """
    from rlsys.simulate.command import run as run_simulation

    more = list(overrides or [])
    if fit is not None and config is not None and "=" in str(config):  # no CONFIG, so that is the first override
        config, more = None, [str(config), *more]
    run_simulation(config, more, workers=workers, learner_gpus=learner_gpus, faults=faults, steps=steps, fitted=fit)


RunPath = Annotated[str, typer.Argument(help="A run directory, or its name under runs/.", show_default=False)]


@app.command()
def scale(
    run: RunPath,
    rollouts: Annotated[str | None, typer.Option(help="How many rollout workers.", show_default=False)] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="How many actors of a reward: N or NAME=N.", show_default=False)
    ] = None,
    tools: Annotated[
        list[str] | None, typer.Option(help="How many actors of a tool: N or NAME=N.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the run to say whether it can.", min=1)] = 60.0,
    wait: Annotated[bool, typer.Option(help="Wait until the new workers serve and the surplus has left.")] = True,
) -> None:
    """Give a live RUN more or fewer workers; training goes on meanwhile.

    What comes later begins as configured: the next stage, and the run when it is resumed.
    """
    from rlsys.control import counts_of, find_run
    from rlsys.control import scale as ask_to_scale

    console = RichConsole(highlight=False, markup=False)
    counts = counts_of(rollouts, rewards or [], tools or [])
    with console.status("asking the driver") as spinner:
        answer = ask_to_scale(
            find_run(run), counts, timeout=timeout, wait=wait, tell=lambda text: spinner.update(_escaped(text))
        )
    console.print(answer.message, soft_wrap=True)


@app.command()
def status(
    run: RunPath,
    once: Annotated[bool, typer.Option("--once", help="Print it and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the run wrote, and end.")] = False,
) -> None:
    """Show what RUN does right now: workers, queue, speed, where the time goes, what happened last."""
    from rlsys.control import find_run
    from rlsys.status_view import show_once, status_text, watch

    folder, console = find_run(run), RichConsole(highlight=False)
    if as_json:
        print(status_text(folder))
    elif once or not console.is_terminal:
        show_once(folder, console)
    else:
        with contextlib.suppress(KeyboardInterrupt):  # that is how one stops looking
            watch(folder, console)


@app.command("grade")
def grade_responses(
    file: Annotated[Path, typer.Argument(help='JSONL with {"response", "answer"} in each line.', show_default=False)],
    reward: Annotated[str, typer.Option(help="`module:object` of any reward.")] = "rlsys.rewards.math:MathReward",
    option: Annotated[list[str] | None, typer.Option(help="Its options: name=value ...", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(help="By default FILE with the ending .graded.jsonl.")] = None,
    timeout: Annotated[float, typer.Option(help="Deadline of one grading, in seconds.", min=0.001)] = 60.0,
) -> None:
    """Grade the responses in FILE, one result line for each, and print what came out.

    A result is `{"score", "status", "extracted", "seconds"}`; where the reward failed, the status is `error` or
    `timeout`, the score null and `message` says why. Responses are graded one after the other; a reward that grades
    groups gets those together that follow one another with the same "id" or "prompt".
    """
    from rlsys.console import Console
    from rlsys.grading import grade_rows, read_responses, summary_rows
    from rlsys.plugins import build
    from rlsys.reward_terms import check_reward

    options = _options(option)
    sys.path.insert(0, os.getcwd())  # the user's own module lies where the user stands
    check_reward(RewardConfig(use=reward, options=options), place="--reward")
    built = build(reward, options, place="--reward")
    target = output or file.with_suffix(".graded.jsonl")
    rows = read_responses(file)
    with Console().counting("grading", total=len(rows)) as tell:
        graded = grade_rows(built, rows, target, tell=tell, timeout_seconds=timeout)
    table = Table("status", "responses", "share", "mean score", "median ms", "max ms", box=None, pad_edge=False)
    for row in summary_rows(graded):
        table.add_row(*row, style="bold" if row[0] == "all" else None)
    RichConsole().print(table)
    plain = RichConsole(highlight=False)
    if failed := next((result for result in graded if result.message), None):
        plain.print(f"[yellow]the first that failed:[/] {_escaped(str(failed.message))}", soft_wrap=True)
    plain.print(f"every result: {target}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what this machine can do: packages, GPUs, and how well the Python tool can be isolated."""
    from rlsys.doctor import examine

    table = Table("what", "here", "what to do", box=None, pad_edge=False)
    findings = examine()
    for finding in findings:
        table.add_row(
            finding.what, f"[{'green' if finding.ok else 'yellow'}]{_escaped(finding.here)}[/]", finding.advice
        )
    RichConsole().print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


papers = typer.Typer(no_args_is_help=True, help="Rerun the claims of papers.")
app.add_typer(papers, name="reproduce")


@papers.command("miniature")
def reproduce_miniature(
    only: Annotated[
        list[str] | None,
        typer.Option(help="An experiment's name, or a YAML file of your own; several with commas.", show_default=False),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of those in the files, such as 0,1,2.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where the runs and tables go.")] = Path("runs/miniature"),
) -> None:
    """Rerun papers' claims in small on two CPU cores: all of `configs/miniature`, or those that `--only` names.

    Each claim gets a table with means over seeds and intervals, differences paired by seed, and the paper's own
    numbers. What is finished is not run again: the same command goes on where it was stopped.
    """
    from rlsys.reproduce.experiment import find_experiments
    from rlsys.reproduce.runner import reproduce
    from rlsys.stages import Interrupted

    names = [name for text in only or [] for name in text.split(",") if name]
    try:
        numbers = [int(text) for text in (seeds or "").replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"--seeds {seeds!r} is not a list of whole numbers such as 0,1,2") from error
    try:
        results = reproduce(find_experiments(names), run_dir, seeds=numbers)
    except Interrupted:
        raise typer.Exit(130) from None
    raise typer.Exit(1 if any(found.failures for found in results) else 0)


tools = typer.Typer(no_args_is_help=True, help="Try what the policy may call.")
app.add_typer(tools, name="tool")


@tools.command("python")
def python_prompt(
    option: Annotated[
        list[str] | None, typer.Option(help="The tool's options: name=value ...", show_default=False)
    ] = None,
) -> None:
    """A prompt in the sandbox that the policy's code runs in. An empty line ends a block, Ctrl-D the session."""
    from rlsys.plugins import build
    from rlsys.prompt import converse

    place = "rlsys tool python --option"
    converse(build("rlsys.tools.python:PythonTool", _options(option), place=place))


def _options(texts: list[str] | None) -> dict[str, Any]:
    """`name=value` texts as options; values are read as YAML."""
    import yaml

    pairs = [text.partition("=") for text in texts or []]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise ConfigError(f"--option {bad[0]!r} is not of the form name=value")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def main() -> None:
    """Run the command; what the user can put right is one message, not a traceback."""
    from rlsys.stages import Interrupted

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except RlsysError as error:
        RichConsole(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)
    except Interrupted as stopped:
        RichConsole(stderr=True).print(f"stopped at {stopped}; go on with --resume")
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
