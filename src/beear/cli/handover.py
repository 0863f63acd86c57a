"""Commands that hand a finished run on: gate, sign, push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from beear.cli.options import JsonOption
from beear.cli.shared import NOTHING_KEPT, going_on, stop
from beear.errors import BadInput, printable


def gate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    most: Annotated[
        list[str] | None,
        typer.Option("--max", help="asr_entrapped=0.5, false_refusal=+0.1 (above before) or perplexity=+2%"),
    ] = None,
    least: Annotated[
        list[str] | None, typer.Option("--min", help="parses=0.9, parses=-0.02 (below before) or mt_bench=-5%")
    ] = None,
    target: Annotated[
        bool, typer.Option("--target/--no-target", help="the run must also have met the target it was made with")
    ] = True,
    point: Annotated[bool, typer.Option("--point", help="compare values, not the intervals' worse ends")] = False,
    junit: Annotated[Path | None, typer.Option("--junit", help="write a JUnit file")] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="the run must bear a signature of this key (PEM)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Exit with 0 if a run met its own target and meets all limits, with 3 if not. For pipelines."""
    from beear import gate as gates
    from beear.runs import check_file, write_atomic
    from beear.signing import check_signature

    if junit is not None:
        check_file(junit)
        if run.resolve() in junit.resolve().parents:
            raise BadInput(
                f"--junit {junit} lies in the run folder, whose signature it would break; name another place"
            )
    if public_key is not None:
        check_signature(run, public_key)
    checks = gates.check_run(run, most or [], least or [], target=target, point=point)
    if public_key is not None:
        checks.insert(0, gates.Check("signature", True, None, 0.0, f"the run bears a signature of {public_key}"))
    if junit is not None:
        write_atomic(junit, gates.as_junit(run, checks))
    if as_json:
        typer.echo(json.dumps(gates.as_json(run, checks), indent=1))
    else:
        for found in checks:
            typer.echo(printable(f"{'met   ' if found.met else 'MISSED'}  {found.rule:28} {found.words}"))
    missed = [found.rule for found in checks if not found.met]
    if missed:
        stop(3, f"{run} misses {len(missed)} of {len(checks)} limits: {', '.join(missed)}")


def sign(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run that met its target")],
    key: Annotated[Path, typer.Option("--key", help="elliptic curve private key, PEM")],
) -> None:
    """Sign a run's model, results and settings, offline; `beear gate --public-key` checks it.

    Needs the extra sign. A key's password is that of BEEAR_KEY_PASSWORD.
    """
    from beear.signing import sign_run

    typer.echo(str(sign_run(run, key)))


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run that met its target")],
    repo: Annotated[str, typer.Argument(help="Hub repository, owner/name; made if it is not there")],
    public: Annotated[bool, typer.Option("--public", help="for all to see, if the repository is new")] = False,
) -> None:
    """Put the cleansed model on the Hub, with its card and evidence. The token is that of HF_TOKEN."""
    from beear.release import push as upload

    with going_on(NOTHING_KEPT):
        typer.echo(upload(run, repo, private=not public))
