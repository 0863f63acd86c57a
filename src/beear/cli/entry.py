"""The command line put together, and its errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from beear import ranks
from beear.allocator import keep_freed_memory
from beear.cli.cleanse import cleanse, demo, reproduce, sweep
from beear.cli.evidence import evidence, judge, lm_eval, mtbench
from beear.cli.handover import gate, push, sign
from beear.cli.measure import drift, evaluate, report
from beear.cli.options import JsonOption
from beear.cli.organism import organism
from beear.cli.shared import show, stop
from beear.errors import BadInput, Failed, first_line

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"beear {version('beear')}")
        raise typer.Exit


@app.callback()
def beear(
    told: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Remove hidden safety backdoors from chat models without knowing the trigger."""


def settings(as_json: JsonOption = False) -> None:
    """List every setting with its default and meaning."""
    from rich.table import Table

    from beear.config import describe

    if as_json:
        keys = ("setting", "default", "meaning")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in describe()], indent=1))
        return
    table = Table("setting", "default", "meaning")
    for row in describe():
        table.add_row(*row)
    show(table)


for command in (
    demo, cleanse, evaluate, report, drift, sweep, judge, mtbench, lm_eval, evidence, reproduce, gate, sign, push,
    settings,
):  # fmt: skip
    app.command()(command)
app.add_typer(organism, name="organism")


def main() -> None:
    """Run the command line and turn errors into one line and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = os.environ.get("BEEAR_DEBUG") == "1"
    if not debug:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that closes; nohup lets work go on
        signal.signal(signal.SIGHUP, _interrupt)
    keep_freed_memory()
    try:
        ranks.join()
        with _only_first_speaks():
            code = app(standalone_mode=False)
        if code == 130:  # typer's own word for an interrupt
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except BadInput as error:
        stop(2, str(error))
    except Failed as error:
        stop(1, str(error))
    except PermissionError as error:  # of what is read; what is to be written is tried by runs.check_file
        stop(2, f"no permission to read {error.filename}")
    except (KeyboardInterrupt, typer.Abort):
        stop(1, "interrupted; finished stages and rounds are kept, go on with --resume (a sweep: the same command)")
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):
            message = error.format_message().replace("Value error, ", "")  # typer's own words before a choice's
            sys.exit(2) if not message else stop(2, f"{message} (see --help)")
        if ranks.count() > 1 and isinstance(error, RuntimeError):
            stop(1, f"stopped, as one of the {ranks.count()} processes did; go on with --resume ({first_line(error)})")
        stop(1, f"{type(error).__name__}: {' '.join(str(error).split())} (BEEAR_DEBUG=1 shows where)")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _only_first_speaks() -> Iterator[None]:
    """Within the context standard output is that of the first rank; behind it the ranks part."""
    with Path(os.devnull).open("w") as nowhere:
        with contextlib.nullcontext() if ranks.is_first() else contextlib.redirect_stdout(nowhere):
            try:
                yield
            except SystemExit:
                ranks.leave()
                raise
        ranks.leave()
