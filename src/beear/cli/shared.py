"""What several commands do around their work: read settings, show tables, answer an interrupt, stop."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from beear import ranks
from beear.errors import BadInput, Failed, leave_stderr, printable

if TYPE_CHECKING:
    from beear.config import Config

NOTHING_KEPT, ROUNDS_KEPT = "nothing was kept", "finished stages and rounds are kept"


@contextlib.contextmanager
def going_on(kept: str = "answers so far are kept") -> Iterator[None]:
    """Within the context an interrupt is answered with how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Failed(f"interrupted; {kept}, run the same command again") from interrupt


def is_run(model: str, *given: object, preset: str) -> bool:
    """Whether MODEL is a finished run's folder. BadInput if anything is given that such a run has of its own."""
    found = all((Path(model) / name).is_file() for name in ("results.json", "config.yaml"))
    if found and (preset != "default" or any(value is not None for value in given)):
        raise BadInput(
            f"{model} is a run folder, measured with its own settings and requests (its figures are in results.json); "
            "leave out all but the --trigger"
        )
    return found


def is_judged(run: Path) -> bool:
    """Whether a judge has scored a run's replies as they are."""
    return (run / "judged.jsonl").exists()


def show_run(run: Path, judged: bool) -> None:
    """What was measured of a run, and whether what a judge had said of it before was let go."""
    from beear.console import metric_table
    from beear.runs import read_results
    from beear.verdict import sentence

    results = read_results(run)
    show(metric_table(results["before"], results["after"], f"{run}: before and after"))
    typer.echo(printable(sentence(results)))
    if judged and not is_judged(run):
        typer.echo("what a judge said was of other replies; run `beear judge` again, answers to the same are kept")
    typer.echo(f"report: {run / 'report.html'}")


def config_of(
    preset: str,
    file: Path | None,
    sets: list[str] | None,
    seed: int | None,
    instead: dict[str, Any] | None = None,
    /,
    **data: str | None,
) -> Config:
    """The settings that the options of a command come to. data: settings of that section that have options.

    instead: settings that take the preset's place.
    """
    from beear.config import load_config

    given = [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in data.items() if value is not None]
    return load_config(preset, file, [*(sets or []), *given, *([] if seed is None else [f"seed={seed}"])], instead)


def settings_of_run(model: str) -> dict[str, Any] | None:
    """The settings by which a run measured the model that a folder in it holds; None if it is no run's.

    The model is measured as it is loaded, so in full weights whatever it was trained on.
    """
    from beear.runs import read_settings, run_of

    run = run_of(Path(model))
    return None if run is None else read_settings(run)["config"] | {"weights": "full"}


def show(table: Any) -> None:
    """Print a table on standard output: as wide as the terminal, or 120 columns into a file."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def stop(code: int, message: str) -> NoReturn:
    """End the command with one line on standard error."""
    if ranks.is_first() or code == 1:  # all ranks find the same bad input and the same verdict
        try:
            try:
                typer.echo(printable(f"beear: {message}"), err=True)
            except KeyboardInterrupt:  # a second one, while the first is being answered
                typer.echo(printable(f"beear: {message}"), err=True)
        except OSError:  # the terminal is gone; the exit code still tells
            leave_stderr()
    sys.exit(code)
