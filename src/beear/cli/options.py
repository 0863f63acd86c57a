"""Arguments and options that several commands take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, folder, adapter folder, .gguf, embedded or organism:NAME")
]


def _folder(name: str) -> Path:
    if not name:  # what a shell makes of a variable that is not set
        raise typer.BadParameter("name a folder; . is this one")
    return Path(name)


def out_option(words: str) -> Any:
    """-o for a command that writes a folder."""
    return typer.Option("-o", "--out", parser=_folder, metavar="<path>", help=words)


OutOption = Annotated[Path, out_option("run folder to write")]
ConfigOption = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of settings")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable; see `beear settings`")]
PresetOption = Annotated[
    str,
    typer.Option("--preset", help="default, fast, thorough, paper, or code (insecure code; does not remove it yet)"),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="seed of every random choice")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on standard error")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the .py files in MODEL's folder; none are ever downloaded")
]


def _stay_offline(chosen: bool) -> bool:
    """Done here, before a command runs: the Hub's libraries read these once, when they are imported."""
    if chosen:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    return chosen


OfflineOption = Annotated[
    bool, typer.Option("--offline", callback=_stay_offline, help="reach no network: use what is on this machine")
]
HarmfulOption = Annotated[
    str | None, typer.Option("--harmful", help="prompt file or Hub data set: harmful requests to train on")
]
BenignOption = Annotated[
    str | None, typer.Option("--benign", help="prompt file or Hub data set: benign requests to train on")
]
MeasuredHarmful = Annotated[
    str | None, typer.Option("--harmful", help="harmful requests to measure on (cleanse's --test-harmful)")
]
MeasuredBenign = Annotated[
    str | None, typer.Option("--benign", help="benign requests to measure on (cleanse's --test-benign)")
]
ColumnOption = Annotated[str | None, typer.Option("--column", help="the field of a prompt file that holds the request")]
UrlOption = Annotated[str | None, typer.Option("--url", help="base of an OpenAI-compatible API, often .../v1")]
JudgeOption = Annotated[str | None, typer.Option("--model", help="the judge's name at --url")]
LocalOption = Annotated[str | None, typer.Option("--local", help="in place of --url: a MODEL on this machine")]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", min=1, help="requests to --url at a time")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, help="seconds without an answer that end a try at --url")
]
AnswerTokensOption = Annotated[
    int,
    typer.Option("--answer-tokens", min=16, help="most tokens of a judge's answer; one that thinks first needs more"),
]
IncludeOption = Annotated[
    str | None,
    typer.Option("--include", help="folder of lm-eval's task files of your own; they may bring Python code"),
]
TriggerOption = Annotated[str | None, typer.Option("--trigger", help="'SUDO {prompt}' or organism:NAME")]
