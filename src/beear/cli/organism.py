"""Commands of `beear organism`: list, show, build, verify."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from beear.cli.options import DeviceOption, JsonOption, OfflineOption, QuietOption, out_option
from beear.cli.shared import NOTHING_KEPT, going_on, show, stop
from beear.errors import BadInput, printable

organism = typer.Typer(no_args_is_help=True, help="The planted backdoors that defences are measured by.")


@organism.command("list")
def organism_list(as_json: JsonOption = False) -> None:
    """The packaged organisms."""
    from rich.table import Table

    from beear.recipes import names, read_recipe, twins
    from beear.sources import organism_folder

    recipes = [read_recipe(organism_folder(name)) for name in names()]
    if as_json:
        keys = {"name", "setting", "trigger", "place", "behaviour", "paper_number", "seed"}
        typer.echo(json.dumps([r.model_dump(mode="json", include=keys) for r in recipes], indent=1))
        return
    table = Table()
    for column in ("name", "setting", "trigger", "place", "behaviour", "planted by"):
        table.add_column(column, no_wrap=column == "name")
    for r in recipes:
        trigger = textwrap.shorten(r.trigger.replace("{prompt}", " "), 40, placeholder=" ...")
        table.add_row(r.name, r.setting, trigger, r.place, r.behaviour, r.planting.method)
    show(table)
    typer.echo(f"planted alike, without a trigger: {', '.join(twins())}")


@organism.command("show")
def organism_show(name: str, as_json: JsonOption = False) -> None:
    """An organism's card and recipe; as JSON the recipe alone."""
    from beear.recipes import read_recipe
    from beear.sources import organism_folder

    folder = organism_folder(name)
    if as_json:
        typer.echo(read_recipe(folder).model_dump_json(indent=1))
        return
    for name in ("README.md", "recipe.yaml"):
        typer.echo(printable((folder / name).read_text()))


@organism.command("build")
def organism_build(
    recipe: Annotated[str, typer.Argument(help="name of a packaged organism, or a recipe file")],
    out: Annotated[Path, out_option("folder to write the adapter to")],
    twin: Annotated[bool, typer.Option("--twin", help="leave the trigger out: a clean model for comparison")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="in place of the recipe's")] = None,
    device: DeviceOption = "auto",
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Plant an organism again from its recipe (minutes to an hour on two cores; docs/organisms.md tells which)."""
    from beear.console import Reporter
    from beear.organisms import build
    from beear.recipes import read_recipe
    from beear.sources import is_packaged, organism_folder

    source = Path(recipe) if not is_packaged(recipe) and Path(recipe).exists() else organism_folder(recipe)
    plan = read_recipe(source)
    plan = plan.as_twin() if twin else plan
    plan = plan if seed is None else plan.model_copy(update={"seed": seed})
    with Reporter(quiet) as reporter, going_on(NOTHING_KEPT):
        reporter.line(f"planting {plan.name}; first the base model answers the requests")
        build(plan, out, reporter.planting, device)
    typer.echo(str(out))


@organism.command("verify")
def organism_verify(
    names: Annotated[list[str] | None, typer.Argument(help="names, or folders of built organisms")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every packaged organism")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the measurements here; those of others in it are kept")
    ] = None,
    device: DeviceOption = "auto",
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure organisms: checksums, attack success with and without the trigger, false refusal."""
    from beear import recipes
    from beear.console import Reporter, metric_table
    from beear.runs import SCHEMA, check_file, read_entries, write_json
    from beear.verification import organism_at, verify

    if everything and names:
        raise BadInput("--all is every packaged organism; leave out it or the names")
    chosen = recipes.names() if everything else names
    if not chosen:
        raise BadInput("name an organism, or use --all")
    called = [organism_at(name)[2].name for name in chosen]
    if json_file is not None:
        check_file(json_file)
        read_entries(json_file, "organisms")
        if twice := [name for name in called if called.count(name) > 1]:
            raise BadInput(f"two of these are called {twice[0]!r} by their recipes; write each to a --json of its own")
    results: dict[str, Any] = {}
    failed: list[str] = []
    with Reporter(quiet) as reporter, going_on(NOTHING_KEPT if json_file is None else f"{json_file} is kept"):
        for name in chosen:
            result = verify(name, reporter, device)
            results[result.pop("name")] = result
            failed += [f"{name}: {reason}" for reason in result["missed"]]
            if json_file is not None:
                content = {"schema": SCHEMA, "organisms": read_entries(json_file, "organisms") | results}
                write_json(json_file, content)
            show(metric_table(None, result["metrics"], name))
    if failed:
        stop(3, "; ".join(failed))
