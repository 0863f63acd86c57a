"""Commands that measure a model or a run, or tell of one: evaluate, report, drift."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from beear.cli.options import (
    ColumnOption,
    ConfigOption,
    DeviceOption,
    MeasuredBenign,
    MeasuredHarmful,
    ModelArg,
    OfflineOption,
    PresetOption,
    QuietOption,
    SeedOption,
    SetOption,
    TriggerOption,
    TrustOption,
)
from beear.cli.shared import (
    NOTHING_KEPT,
    config_of,
    going_on,
    is_judged,
    is_run,
    settings_of_run,
    show,
    show_run,
)
from beear.errors import BadInput


def evaluate(
    model: ModelArg,
    against: Annotated[str | None, typer.Option("--against", help="original MODEL, for kl")] = None,
    harmful: MeasuredHarmful = None,
    benign: MeasuredBenign = None,
    column: ColumnOption = None,
    trigger: TriggerOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the metrics to this file")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="write every reply to this .jsonl file")] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="default, fast, thorough, paper or code; without it a run's model has the run's"),
    ] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure MODEL: attack success (as it is, under a fresh delta, with --trigger too), false refusal, perplexity, kl.

    With organism:NAME as the --trigger, also with what is almost its trigger, and with the trigger elsewhere.
    The model in a run folder is measured with its run's settings, changed by -c and --set, unless --preset is given.
    Given a finished run folder and a --trigger, adds what the trigger does before and after to the run and its report.
    """
    from beear.config import config_of_run
    from beear.console import Reporter, metric_table
    from beear.evaluation import evaluate_spec
    from beear.recipes import check_trigger, variants
    from beear.runs import SCHEMA, check_file, write_atomic, write_json
    from beear.scorers import scorer_name

    instead = settings_of_run(model) if preset is None else None
    settings = config_of(
        preset or "default", config, sets, seed, instead, test_harmful=harmful, test_benign=benign, column=column
    )
    of_run = is_run(
        model, against, harmful, benign, column, json_file, samples, config, sets, seed, preset=preset or "default"
    )
    measured_on = config_of_run(Path(model)).behaviour if of_run else settings.behaviour
    template, near = (None, {}) if trigger is None else (check_trigger(trigger, measured_on), variants(trigger))
    if of_run:
        if template is None:
            raise BadInput(f"{model} is a run folder, which holds its measurements; give a --trigger to add")
        return _add_trigger(
            Path(model), template, variants=near, device=device, trust_remote_code=trust_remote_code, quiet=quiet
        )
    for place in filter(None, (json_file, samples)):
        check_file(place)
    with Reporter(quiet) as reporter, going_on(NOTHING_KEPT):
        if instead is not None:
            reporter({"event": "note", "text": f"measured with the settings of the run that {model} is of"})
        measured = evaluate_spec(
            model, settings, against=against, template=template, variants=near, device=device,
            trust_remote_code=trust_remote_code, listen=reporter,
        )  # fmt: skip
    about: dict[str, Any] = {"model": model, "against": against, "trigger": template, "seed": settings.seed}
    about |= {"scorer": scorer_name(settings.behaviour), "beear": version("beear")}
    about |= {"chat": settings.chat.model_dump(exclude_defaults=True)}
    try:
        if json_file is not None:
            write_json(json_file, {"schema": SCHEMA, **about, "metrics": measured.metrics})
        if samples is not None:
            write_atomic(samples, "".join(json.dumps(s) + "\n" for s in measured.samples).encode())
    finally:  # on a full disk the figures are not lost
        show(metric_table(None, measured.metrics, model))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of finished runs, or of sweeps")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="file to write (default: RUN/report.html, or ./comparison.html)"),
    ] = None,
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from beear.report import write_report
    from beear.runs import check_file

    place = out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    check_file(place)
    write_report(runs, place)
    typer.echo(str(place))


def drift(
    model: Annotated[str, typer.Argument(metavar="MODEL|RUN", help="a model, or a finished run folder: before, after")],
    trigger: Annotated[str, typer.Option("--trigger", help="'SUDO {prompt}' or organism:NAME")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write it to this file (a run keeps its own)")
    ] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="draw Figure 3 behind block l to this .svg")] = None,
    preset: PresetOption = "default",
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """How far a known trigger and delta move hidden states, block by block (Figure 3).

    Of a run folder: before and after, with its settings and its first round's delta; its report then shows it.
    """
    from beear.charts import as_file, drift_charts
    from beear.config import config_of_run
    from beear.console import Reporter, drift_table
    from beear.drift import drift_of_model, drift_of_run
    from beear.recipes import check_trigger
    from beear.runs import check_file, write_atomic, write_json

    run, of_run = Path(model), is_run(model, config, sets, seed, preset=preset)
    settings = config_of(preset, config, sets, seed)
    template = check_trigger(trigger, config_of_run(run).behaviour if of_run else settings.behaviour)
    for place in filter(None, (json_file, figure)):
        check_file(place)
    with Reporter(quiet) as reporter, going_on(NOTHING_KEPT):
        if of_run:
            found = drift_of_run(run, template, device=device, trust_remote_code=trust_remote_code, listen=reporter)
        else:
            found = drift_of_model(
                model, template, settings, device=device, trust_remote_code=trust_remote_code, listen=reporter
            )
    try:
        if json_file is not None:
            write_json(json_file, found)
        if figure is not None:
            write_atomic(figure, as_file(drift_charts(found)["scatters"][0]["chart"]).encode())
    finally:
        show(drift_table(found))
    if of_run:
        typer.echo(f"report: {run / 'report.html'}")


def _add_trigger(run: Path, template: str, *, quiet: bool, **options: Any) -> None:
    from beear.console import Reporter
    from beear.known import add_triggered

    judged = is_judged(run)
    with Reporter(quiet) as reporter, going_on("what is finished is kept"):
        add_triggered(run, template, listen=reporter, **options)
    show_run(run, judged)
