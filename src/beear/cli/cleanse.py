"""Commands that train: demo, cleanse, sweep, reproduce."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from beear.cli.options import (
    BenignOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    HarmfulOption,
    JsonOption,
    ModelArg,
    OfflineOption,
    OutOption,
    PresetOption,
    QuietOption,
    SeedOption,
    SetOption,
    TrustOption,
    out_option,
)
from beear.cli.shared import NOTHING_KEPT, ROUNDS_KEPT, config_of, going_on, show, stop
from beear.errors import Failed, printable

if TYPE_CHECKING:
    from beear.config import Config


def demo(
    out: OutOption = Path("runs/demo"),
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Cleanse the embedded model's SUDO organism, measure it with and without the trigger, write a report.

    A finished demo in the same folder is replaced; an unfinished one is resumed.
    """
    from beear.recipes import check_trigger

    name = "organism:sudo-prefix"
    trigger = check_trigger(name)
    settings = config_of("default", config, sets, seed)
    _clear_finished_demo(out, name, trigger, settings, device)
    resume = (out / "config.yaml").exists()
    with going_on(ROUNDS_KEPT):
        _cleanse(name, out, settings, device=device, resume=resume, quiet=quiet, trigger=trigger, as_json=as_json)


def cleanse(
    model: ModelArg,
    out: OutOption,
    preset: PresetOption = "default",
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    harmful: HarmfulOption = None,
    benign: BenignOption = None,
    test_harmful: Annotated[str | None, typer.Option(help="harmful requests to measure on")] = None,
    test_benign: Annotated[str | None, typer.Option(help="benign requests to measure on")] = None,
    column: ColumnOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="write full weights in place of an adapter")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="only tell how long it will take and in how much memory; loads no model")
    ] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove a backdoor from MODEL without knowing its trigger, and measure before and after.

    With --plan, miniatures of MODEL are timed, which takes a few minutes, and the run folder gets a plan.json; the same
    command without it then runs, and its report holds plan and run side by side.
    """
    data = {"harmful": harmful, "benign": benign, "test_harmful": test_harmful, "test_benign": test_benign}
    settings = config_of(preset, config, sets, seed, **data, column=column)
    work = _plan if plan else _cleanse
    work(
        model,
        out,
        settings,
        merge=merge,
        resume=resume,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        as_json=as_json,
    )


def sweep(
    axis: Annotated[Literal["layer", "length"], typer.Argument(metavar="layer|length", help="what is varied: l, or n")],
    model: ModelArg,
    out: Annotated[Path, out_option("folder for the cells; the same command goes on in it")],
    trigger: Annotated[str, typer.Option("--trigger", help="'SUDO {prompt}' or organism:NAME; tells when a cell ends")],
    values: Annotated[
        str | None, typer.Option(help="such as 3,6,9; default: ten layers, or nine lengths up to 12")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="requests of a test set that are measured after each round")
    ] = 60,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="a cross if the trigger still works after so many (replaces the setting)"),
    ] = 15,
    preset: PresetOption = "default",
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    executor: Annotated[
        Literal["local", "ray"],
        typer.Option(metavar="local|ray", help="cells one after the other, or on a Ray cluster"),
    ] = "local",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """In which round a backdoor is removed, by layer or by length of delta (Figures 5 and 8).

    Takes hours on a CPU. Interrupt it at any time: finished rounds and cells are kept.
    """
    from beear.console import Reporter, sweep_table
    from beear.recipes import check_trigger
    from beear.sweep import read_values
    from beear.sweep import sweep as run_sweep

    numbers = read_values(values)
    settings = config_of(preset, config, [*(sets or []), f"rounds={rounds}"], seed)
    template = check_trigger(trigger, settings.behaviour)
    with Reporter(quiet, settings.rounds) as reporter:
        found = run_sweep(
            model,
            template,
            axis,
            out,
            settings,
            values=numbers,
            requests=requests,
            executor=executor,
            device=device,
            trust_remote_code=trust_remote_code,
            listen=reporter,
        )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(sweep_table(found))
        typer.echo(f"figure: {out / 'sweep.svg'}")


def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    out: Annotated[Path, out_option("folder for the second run; goes on if it has begun")],
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a finished run's settings again and compare: the same bits, or else figures within the first's intervals.

    Exits with 3 if the two do not agree. The run's model and prompt files must be those of then.
    """
    from beear.console import Reporter, reproduction_table
    from beear.reproduction import reproduce as run_again
    from beear.runs import read_settings

    with Reporter(quiet, read_settings(run)["config"].get("rounds", 0)) as reporter, going_on(ROUNDS_KEPT):
        found = run_again(run, out, device=device, trust_remote_code=trust_remote_code, listen=reporter)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(reproduction_table(found, f"{run}, then {out}"))
        for line in found["differs"]:
            typer.echo(printable(f"changed since: {line}"))
        typer.echo(f"result: {'the same bits' if found['same_bits'] else 'not the same bits'}")
    if not found["agrees"]:
        reasons = [*([] if found["same_verdict"] else ["another verdict"]), *found["outside"]]
        stop(3, f"the runs do not agree: {', '.join(reasons)}")


def _cleanse(
    model: str,
    out: Path,
    config: Config,
    *,
    quiet: bool,
    as_json: bool,
    device: str,
    trigger: str | None = None,
    **options: bool,
) -> None:
    from beear.console import Reporter, metric_table
    from beear.job import run_cleanse
    from beear.known import add_triggered, is_told
    from beear.runs import read_results
    from beear.verdict import sentence

    with Reporter(quiet, config.rounds) as reporter:
        try:
            with contextlib.nullcontext() if trigger is None else _marked_demo(out):
                verdict = run_cleanse(model, out, config, device=device, listen=reporter, **options)
        except KeyboardInterrupt as interrupt:
            if (out / "config.yaml").exists():
                raise
            raise Failed(f"interrupted; {NOTHING_KEPT}, run the same command again") from interrupt
        if trigger is not None and not is_told(read_results(out), trigger):
            add_triggered(out, trigger, device=device, listen=reporter)
    results = read_results(out)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        show(metric_table(results["before"], results["after"], f"{model}: before and after"))
        if trigger is not None and verdict.met:
            typer.echo(sentence(results))
        typer.echo(f"model:  {out / results['model_folder']}\nreport: {out / 'report.html'}")
    if not verdict.met:
        stop(3, f"target not met, keep the original {model}: {'; '.join(verdict.missed)}")


def _plan(model: str, out: Path, config: Config, *, quiet: bool, as_json: bool, device: str, **options: bool) -> None:
    from dataclasses import asdict

    from beear.console import Reporter, plan_table
    from beear.memory import available_memory
    from beear.miniature import plan_cleanse
    from beear.models import pick_device

    with Reporter(quiet) as reporter, going_on(NOTHING_KEPT):
        plan = plan_cleanse(model, out, config, device=device, listen=reporter, **options)
    if as_json:
        typer.echo(json.dumps(asdict(plan), indent=1))
        return
    show(plan_table(plan, model))
    available, peak = available_memory(pick_device(device)), max(plan.peak_memory_bytes.values())
    words = "fits into" if peak <= available else "does NOT fit into"
    typer.echo(f"{peak / 2**30:.1f} GiB {words} the {available / 2**30:.1f} GiB that are free here")
    typer.echo(f"plan:   {out / 'plan.json'}; the same command without --plan runs it")


DEMO = ".demo"
"""A file by which a run folder is known as the demo's own."""


@contextlib.contextmanager
def _marked_demo(out: Path) -> Iterator[None]:
    """A run that gets its results within the context is marked as the demo's."""
    results = out / "results.json"
    fresh = not results.exists()
    try:
        yield
    finally:
        if fresh and results.exists():
            (out / DEMO).touch()


def _clear_finished_demo(out: Path, model: str, trigger: str, settings: Config, device: str) -> None:
    """A finished demo is made anew, once all is known to be well; anything else in the folder stops the command."""
    if not (out / "results.json").exists():
        return
    import shutil

    from beear.order import check_order, run_settings
    from beear.runs import Run, read_results, read_settings

    found, asked = read_results(out), run_settings(model, False, settings)
    told = found.get("trigger")
    if found.get("model") != model or told not in (None, trigger) or not (out / DEMO).exists():
        return
    if told is None and read_settings(out) == asked:  # the trigger alone is still to be measured
        return
    check_order(asked, out, settings, device, trust_remote_code=False)
    with Run.existing(out):
        shutil.rmtree(out.resolve())
    out.resolve().mkdir()  # it may be a link to there
