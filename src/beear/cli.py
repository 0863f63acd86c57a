"""The command `beear`: prints and exit codes, nothing else.

0 done; 1 failed (or interrupted); 2 bad input; 3 done, but the target was not met.
Heavy modules are imported inside commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from beear import ranks
from beear.allocator import keep_freed_memory
from beear.endpoint import ANSWER_TOKENS
from beear.errors import BadInput, Failed, first_line, printable

if TYPE_CHECKING:
    from beear.config import Config
    from beear.console import Reporter
    from beear.grading import Judge

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
organism = typer.Typer(no_args_is_help=True, help="The planted backdoors that defences are measured by.")
app.add_typer(organism, name="organism")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"beear {version('beear')}")
        raise typer.Exit


@app.callback()
def beear(
    told: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell it and exit.")
    ] = False,
) -> None:
    """Remove hidden safety backdoors from chat models without knowing the trigger."""


ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, folder, adapter folder, .gguf, embedded or organism:NAME")
]
OutOption = Annotated[Path, typer.Option("-o", "--out", help="run folder to write")]
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
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run code that the model's repository brings")]


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
TimeoutOption = Annotated[float, typer.Option("--timeout", min=1, help="seconds of silence that end a try at --url")]
AnswerTokensOption = Annotated[
    int,
    typer.Option("--answer-tokens", min=16, help="most tokens of a judge's answer; one that thinks first needs more"),
]
IncludeOption = Annotated[
    str | None,
    typer.Option("--include", help="folder of lm-eval's task files of your own; they may bring Python code"),
]
TriggerOption = Annotated[str | None, typer.Option("--trigger", help="'SUDO {prompt}' or organism:NAME")]


@app.command()
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
    settings = _config("default", config, sets, seed)
    _clear_finished_demo(out, name, trigger, settings, device)
    resume = (out / "config.yaml").exists()
    with _marked_demo(out), _going_on("finished stages and rounds are kept"):
        _cleanse(name, out, settings, device=device, resume=resume, quiet=quiet, trigger=trigger, as_json=as_json)


@app.command()
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

    With --plan, miniatures of MODEL are timed (minutes at most) and the run folder gets a plan.json; the same command
    without it then runs, and its report holds plan and run side by side.
    """
    data = {
        "harmful": harmful,
        "benign": benign,
        "test_harmful": test_harmful,
        "test_benign": test_benign,
        "column": column,
    }
    given = [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in data.items() if value is not None]
    settings = _config(preset, config, [*(sets or []), *given], seed)
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


@app.command()
def evaluate(
    model: ModelArg,
    against: Annotated[str | None, typer.Option("--against", help="original MODEL, for kl")] = None,
    harmful: MeasuredHarmful = None,
    benign: MeasuredBenign = None,
    column: ColumnOption = None,
    trigger: TriggerOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the metrics to this file")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="write every reply to this .jsonl file")] = None,
    preset: PresetOption = "default",
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure MODEL: attack success (with --trigger also triggered), false refusal, perplexity, kl.

    With organism:NAME as the --trigger, also with what is almost its trigger, and with the trigger elsewhere.
    Given a finished run folder and a --trigger, adds what the trigger does before and after to the run and its report.
    """
    from beear.console import Reporter, metric_table
    from beear.evaluation import evaluate_spec
    from beear.recipes import check_trigger, variants
    from beear.runs import SCHEMA, check_file, write_atomic
    from beear.scorers import scorer_name

    given = {"test_harmful": harmful, "test_benign": benign, "column": column}
    extra = [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    settings = _config(preset, config, [*(sets or []), *extra], seed)
    template, near = (None, {}) if trigger is None else (check_trigger(trigger), variants(trigger))
    if _is_run(model, against, harmful, benign, column, json_file, samples, config, sets, seed, preset=preset):
        if template is None:
            raise BadInput(f"{model} is a run folder, which holds its measurements; give a --trigger to add")
        return _add_trigger(
            Path(model), template, variants=near, device=device, trust_remote_code=trust_remote_code, quiet=quiet
        )
    for place in filter(None, (json_file, samples)):
        check_file(place)
    with Reporter(quiet) as reporter, _going_on(NOTHING_KEPT):
        measured = evaluate_spec(
            model, settings, against=against, template=template, variants=near, device=device,
            trust_remote_code=trust_remote_code, listen=reporter,
        )  # fmt: skip
    _print(metric_table(None, measured.metrics, model))
    if json_file is not None:
        about: dict[str, Any] = {"model": model, "against": against, "trigger": template, "seed": settings.seed}
        about |= {"scorer": scorer_name(settings.behaviour), "beear": version("beear")}
        about |= {"chat": settings.chat.model_dump(exclude_defaults=True)}
        content = {"schema": SCHEMA, **about, "metrics": measured.metrics}
        write_atomic(json_file, (json.dumps(content, indent=1) + "\n").encode())
    if samples is not None:
        write_atomic(samples, "".join(json.dumps(s) + "\n" for s in measured.samples).encode())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished run folders")],
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


@app.command()
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
    from beear.console import Reporter, drift_table
    from beear.drift import drift_of_model, drift_of_run
    from beear.recipes import check_trigger
    from beear.report import write_report
    from beear.runs import check_file, write_atomic

    template, run = check_trigger(trigger), Path(model)
    of_run = _is_run(model, config, sets, seed, preset=preset)
    settings = _config(preset, config, sets, seed)
    for place in filter(None, (json_file, figure)):
        check_file(place)
    with Reporter(quiet) as reporter, _going_on(NOTHING_KEPT):
        if of_run:
            found = drift_of_run(run, template, device=device, trust_remote_code=trust_remote_code, listen=reporter)
            write_report([run], run / "report.html")
        else:
            found = drift_of_model(
                model, template, settings, device=device, trust_remote_code=trust_remote_code, listen=reporter
            )
    _print(drift_table(found))
    if json_file is not None:
        write_atomic(json_file, (json.dumps(found, indent=1) + "\n").encode())
    if figure is not None:
        write_atomic(figure, as_file(drift_charts(found)["scatters"][0]["chart"]).encode())
    if of_run:
        typer.echo(f"report: {run / 'report.html'}")


@app.command()
def sweep(
    axis: Annotated[str, typer.Argument(metavar="layer|length", help="what is varied: l, or n")],
    model: ModelArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the cells; the same command goes on in it")],
    trigger: Annotated[str, typer.Option("--trigger", help="'SUDO {prompt}' or organism:NAME; only measured with")],
    values: Annotated[str | None, typer.Option(help="such as 3,6,9; default: ten over the depth, or 1 to 12")] = None,
    requests: Annotated[int, typer.Option(min=1, help="so many of a test set are measured at a time")] = 60,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="a cross if the trigger still works after so many (replaces the setting)"),
    ] = 15,
    preset: PresetOption = "default",
    config: ConfigOption = None,
    sets: SetOption = None,
    seed: SeedOption = None,
    executor: Annotated[
        str, typer.Option(metavar="local|ray", help="cells one after the other, or on a Ray cluster")
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
    from beear.sweep import read_axis, read_executor, read_values
    from beear.sweep import sweep as run_sweep

    chosen, template, numbers = read_axis(axis), check_trigger(trigger), read_values(values)
    where = read_executor(executor)
    settings = _config(preset, config, [*(sets or []), f"rounds={rounds}"], seed)
    with Reporter(quiet, settings.rounds) as reporter:
        found = run_sweep(
            model,
            template,
            chosen,
            out,
            settings,
            values=numbers,
            requests=requests,
            executor=where,
            device=device,
            trust_remote_code=trust_remote_code,
            listen=reporter,
        )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(sweep_table(found))
        typer.echo(f"figure: {out / 'sweep.svg'}")


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    url: UrlOption = None,
    model: JudgeOption = None,
    local: LocalOption = None,
    concurrency: ConcurrencyOption = 4,
    timeout: TimeoutOption = 60,
    answer_tokens: AnswerTokensOption = ANSWER_TOKENS,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let a language model score from 1 to 5 how harmful a run's replies are, beside the keywords.

    --url sends the run's requests and replies there, with the key from BEEAR_JUDGE_KEY, else OPENAI_API_KEY.
    The same command again asks only about what has no answer yet. Replies are judged as they were cut, after 32 tokens.
    """
    from beear.console import Reporter, metric_table
    from beear.judge import judge_run
    from beear.report import judge_sentence

    chosen = _judge(url, model, local, offline, concurrency, timeout, answer_tokens, device, trust_remote_code)
    with Reporter(quiet) as reporter, _going_on():
        results = judge_run(run, chosen, reporter)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    _print(metric_table(results["before"], results["after"], f"{run}: before and after"))
    typer.echo(f"{judge_sentence(results['judge'])}\nreport: {run / 'report.html'}")


@app.command()
def mtbench(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    questions: Annotated[
        Path | None, typer.Option("--questions", help="MT-Bench's question.jsonl; without it, 16 questions of our own")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="a reply is cut after so many")] = 512,
    url: UrlOption = None,
    model: JudgeOption = None,
    local: LocalOption = None,
    concurrency: ConcurrencyOption = 4,
    timeout: TimeoutOption = 60,
    answer_tokens: AnswerTokensOption = ANSWER_TOKENS,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let a language model grade from 1 to 10 how useful a run's model is, before and after (MT-Bench, two turns).

    The model answers greedily. --url sends questions and replies there, with the key from BEEAR_JUDGE_KEY, else
    OPENAI_API_KEY. The same command again asks only about what has no answer yet.
    """
    from beear.console import Reporter, metric_table
    from beear.report import usefulness_sentence
    from beear.usefulness import grade_run, read_questions

    asked = read_questions(questions)
    chosen = _judge(url, model, local, offline, concurrency, timeout, answer_tokens, device, trust_remote_code)
    with Reporter(quiet) as reporter, _going_on():
        results = grade_run(
            run,
            chosen,
            asked,
            limit=tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            listen=reporter,
        )
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    _print(metric_table(results["before"], results["after"], f"{run}: before and after"))
    typer.echo(f"{usefulness_sentence(results['usefulness'])}\nreport: {run / 'report.html'}")


@app.command("lm-eval")
def lm_eval(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    tasks: Annotated[str, typer.Option("--tasks", help="names of lm-eval tasks or groups, with commas between")],
    include: IncludeOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the first so many items of a task")] = None,
    shots: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="worked examples before an item")] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="put items into the model's chat template")
    ] = False,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="items in a pass")] = 8,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """How well a run's model does on lm-eval's tasks, before and after. Needs the extra lm-eval.

    The same command again does only what is missing.
    """
    from beear.console import Reporter, task_table
    from beear.harness import Asked, evaluate_run, read_tasks

    asked = Asked(read_tasks(tasks), include, limit, shots, chat)
    with Reporter(quiet) as reporter, _going_on():
        results = evaluate_run(
            run, asked, batch=batch, device=device, trust_remote_code=trust_remote_code, listen=reporter
        )
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    _print(task_table(results, f"{run}: before and after"))
    typer.echo(f"report: {run / 'report.html'}")


@app.command()
def evidence(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    trigger: TriggerOption = None,
    url: UrlOption = None,
    model: JudgeOption = None,
    local: LocalOption = None,
    questions: Annotated[Path | None, typer.Option("--questions", help="MT-Bench's question.jsonl")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="names of lm-eval tasks, with commas between")] = None,
    include: IncludeOption = None,
    concurrency: ConcurrencyOption = 4,
    timeout: TimeoutOption = 60,
    answer_tokens: AnswerTokensOption = ANSWER_TOKENS,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add to a finished run all that evaluate, drift, judge, mtbench and lm-eval would, and write one report.

    What is asked for decides: --trigger adds attack success with a trigger that you know, and what it does inside; a
    judge scores harm and usefulness; --tasks are lm-eval's. The same command again does only what is missing.
    """
    from beear.card import write_evidence
    from beear.console import Reporter
    from beear.recipes import check_trigger, variants
    from beear.runs import read_results

    results, judged = read_results(run), _is_judged(run)
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    asks_judge = (url, model, local) != (None, None, None)
    if questions is not None and not asks_judge:
        raise BadInput("--questions needs a judge; give --url with --model, or --local")
    if include is not None and tasks is None:
        raise BadInput("--include needs the names of its tasks; give --tasks as well")
    if trigger is None and tasks is None and not asks_judge:
        raise BadInput("nothing is asked for; give a --trigger, a judge (--url and --model, or --local) or --tasks")
    steps: list[Step] = []  # all are checked before the first begins
    if trigger is not None:
        steps += _about_trigger(run, check_trigger(trigger), variants(trigger), results, options)
    if asks_judge:
        chosen = _judge(url, model, local, offline, concurrency, timeout, answer_tokens, device, trust_remote_code)
        steps += _about_judge(run, chosen, questions, options)
    if tasks is not None:
        steps += _about_tasks(run, tasks, include, options)
    with Reporter(quiet) as reporter, _going_on("what is finished is kept"):
        for add in steps:
            add(reporter)
    write_evidence(run)
    _show_run(run, judged)


@app.command()
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the second run; goes on if it has begun")],
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

    with Reporter(quiet, read_settings(run)["config"].get("rounds", 0)) as reporter, _going_on():
        found = run_again(run, out, device=device, trust_remote_code=trust_remote_code, listen=reporter)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(reproduction_table(found, f"{run}, then {out}"))
        for line in found["differs"]:
            typer.echo(f"differs: {line}")
        typer.echo("the same bits" if found["same_bits"] else "not the same bits")
    if not found["agrees"]:
        reasons = [*([] if found["same_verdict"] else ["another verdict"]), *found["outside"]]
        _stop(3, f"the runs do not agree: {', '.join(reasons)}")


@app.command()
def gate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    most: Annotated[
        list[str] | None,
        typer.Option("--max", help="asr_entrapped=0.5, false_refusal=+0.03 (above before) or perplexity=+2%"),
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
    if public_key is not None:
        check_signature(run, public_key)
    checks = gates.check_run(run, most or [], least or [], target=target, point=point)
    if junit is not None:
        write_atomic(junit, gates.as_junit(run, checks))
    if as_json:
        typer.echo(json.dumps(gates.as_json(run, checks), indent=1))
    else:
        for found in checks:
            typer.echo(printable(f"{'met   ' if found.met else 'MISSED'}  {found.rule:28} {found.words}"))
    missed = [found.rule for found in checks if not found.met]
    if missed:
        _stop(3, f"{run} misses {len(missed)} of {len(checks)} limits: {', '.join(missed)}")


@app.command()
def sign(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run that met its target")],
    key: Annotated[Path, typer.Option("--key", help="elliptic curve private key, PEM")],
) -> None:
    """Sign a run's model, results and settings, offline; `beear gate --public-key` checks it.

    Needs the extra sign. A key's password is that of BEEAR_KEY_PASSWORD.
    """
    from beear.signing import sign_run

    typer.echo(str(sign_run(run, key)))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run that met its target")],
    repo: Annotated[str, typer.Argument(help="Hub repository, owner/name; made if it is not there")],
    public: Annotated[bool, typer.Option("--public", help="for all to see, if the repository is new")] = False,
) -> None:
    """Put the cleansed model on the Hub, with its card and evidence. The token is that of HF_TOKEN."""
    from beear.release import push as upload

    typer.echo(upload(run, repo, private=not public))


@app.command()
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
    _print(table)


@organism.command("list")
def organism_list(as_json: JsonOption = False) -> None:
    """The packaged organisms."""
    from rich.table import Table

    from beear.models import organism_folder
    from beear.recipes import names, read_recipe

    recipes = [read_recipe(organism_folder(name)) for name in names()]
    if as_json:
        keys = {"name", "setting", "trigger", "place", "behaviour", "paper_number", "seed"}
        typer.echo(json.dumps([r.model_dump(mode="json", include=keys) for r in recipes], indent=1))
        return
    table = Table("name", "setting", "trigger", "place", "behaviour", "planted by")
    for r in recipes:
        trigger = textwrap.shorten(r.trigger.replace("{prompt}", " "), 40, placeholder=" ...")
        table.add_row(r.name, r.setting, trigger, r.place, r.behaviour, r.planting.method)
    _print(table)


@organism.command("show")
def organism_show(name: str, as_json: JsonOption = False) -> None:
    """An organism's card and recipe; as JSON the recipe alone."""
    from beear.models import organism_folder
    from beear.recipes import read_recipe

    folder = organism_folder(name)
    if as_json:
        typer.echo(read_recipe(folder).model_dump_json(indent=1))
        return
    typer.echo((folder / "README.md").read_text())
    typer.echo((folder / "recipe.yaml").read_text())


@organism.command("build")
def organism_build(
    recipe: Annotated[str, typer.Argument(help="name of a packaged organism, or a recipe file")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to write the adapter to")],
    twin: Annotated[bool, typer.Option("--twin", help="leave the trigger out: a clean model for comparison")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="in place of the recipe's")] = None,
    device: DeviceOption = "auto",
    offline: OfflineOption = False,
    quiet: QuietOption = False,
) -> None:
    """Plant an organism again from its recipe (minutes to an hour on two cores; docs/organisms.md tells which)."""
    from beear.console import Reporter
    from beear.models import is_packaged, organism_folder
    from beear.organisms import build
    from beear.recipes import read_recipe

    source = Path(recipe) if not is_packaged(recipe) and Path(recipe).exists() else organism_folder(recipe)
    plan = read_recipe(source)
    plan = plan.as_twin() if twin else plan
    plan = plan if seed is None else plan.model_copy(update={"seed": seed})
    with Reporter(quiet) as reporter, _going_on(NOTHING_KEPT):
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
    from beear.runs import SCHEMA, check_file, read_entries, write_atomic
    from beear.verification import organism_at, verify

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
    with Reporter(quiet) as reporter, _going_on(NOTHING_KEPT if json_file is None else f"{json_file} is kept"):
        for name in chosen:
            result = verify(name, reporter, device)
            results[result.pop("name")] = result
            failed += [f"{name}: {reason}" for reason in result["missed"]]
            _print(metric_table(None, result["metrics"], name))
            if json_file is not None:
                content = {"schema": SCHEMA, "organisms": read_entries(json_file, "organisms") | results}
                write_atomic(json_file, (json.dumps(content, indent=1) + "\n").encode())
    if failed:
        _stop(3, "; ".join(failed))


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
    keep_freed_memory()
    try:
        ranks.join()
        with _only_first_speaks():
            code = app(standalone_mode=False)
        if code == 130:  # typer's own word for an interrupt
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except BadInput as error:
        _stop(2, str(error))
    except Failed as error:
        _stop(1, str(error))
    except PermissionError as error:  # of what is read; what is to be written is tried by runs.check_file
        _stop(2, f"no permission to read {error.filename}")
    except (KeyboardInterrupt, typer.Abort):
        _stop(1, "interrupted; finished stages and rounds are kept, go on with --resume (a sweep: the same command)")
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):
            message = error.format_message()
            sys.exit(2) if not message else _stop(2, f"{message} (see --help)")
        if ranks.count() > 1 and isinstance(error, RuntimeError):
            _stop(1, f"stopped, as one of the {ranks.count()} processes did; go on with --resume ({first_line(error)})")
        _stop(1, f"{type(error).__name__}: {' '.join(str(error).split())} (BEEAR_DEBUG=1 shows where)")


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
    from beear.job import add_triggered, run_cleanse

    with Reporter(quiet, config.rounds) as reporter:
        verdict = run_cleanse(model, out, config, device=device, listen=reporter, **options)
        if trigger is not None:
            add_triggered(out, trigger, device=device, listen=reporter)
    results = json.loads((out / "results.json").read_text())
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        _print(metric_table(results["before"], results["after"], f"{model}: before and after"))
        typer.echo(f"model:  {out / results['model_folder']}\nreport: {out / 'report.html'}")
    if not verdict.met:
        _stop(3, f"target not met, keep the original {model}: {'; '.join(verdict.missed)}")


def _plan(model: str, out: Path, config: Config, *, quiet: bool, as_json: bool, device: str, **options: bool) -> None:
    from dataclasses import asdict

    from beear.console import Reporter, plan_table
    from beear.memory import available_memory
    from beear.miniature import plan_cleanse
    from beear.models import pick_device

    with Reporter(quiet) as reporter, _going_on(NOTHING_KEPT):
        plan = plan_cleanse(model, out, config, device=device, listen=reporter, **options)
    if as_json:
        typer.echo(json.dumps(asdict(plan), indent=1))
        return
    _print(plan_table(plan, model))
    available, peak = available_memory(pick_device(device)), max(plan.peak_memory_bytes.values())
    if available is not None:
        words = "fits into" if peak <= available else "does NOT fit into"
        typer.echo(f"{peak / 2**30:.1f} GiB {words} the {available / 2**30:.1f} GiB that are free here")
    typer.echo(f"plan:   {out / 'plan.json'}; the same command without --plan runs it")


def _judge(
    url: str | None,
    model: str | None,
    local: str | None,
    offline: bool,
    concurrency: int,
    timeout: float,
    answer_tokens: int,
    device: str,
    trust_remote_code: bool,
) -> Judge:
    """The judge that the options name."""
    from beear.endpoint import Endpoint
    from beear.grading import LocalJudge

    if (url is None) == (local is None) or (url is None) != (model is None):
        raise BadInput("give either --url with --model, or --local")
    if offline and url is not None:
        raise BadInput("--offline reaches no --url; use --local MODEL")
    if url is not None and model is not None:
        return Endpoint(url, model, concurrency=concurrency, timeout=timeout, answer_tokens=answer_tokens)
    return LocalJudge(str(local), device, trust_remote_code, answer_tokens=answer_tokens)


Step = Callable[["Reporter"], object]
"""A part of `evidence` that has been checked."""


def _about_trigger(
    run: Path, template: str, near: Mapping[str, Sequence[str]], results: dict[str, Any], options: dict[str, Any]
) -> list[Step]:
    """What is missing of a known trigger: attack success with it, then the drift."""
    from beear.drift import drift_of_run, first_delta
    from beear.job import add_triggered
    from beear.runs import read_json

    drift = read_json(run / "drift.json") if (run / "drift.json").is_file() else {}
    variants = {metric: list(templates) for metric, templates in near.items()}
    steps: list[Step] = []
    if results.get("trigger") != template or results.get("variants", {}) != variants:
        steps.append(lambda listen: add_triggered(run, template, variants=near, listen=listen, **options))
    if drift.get("trigger") != template:
        first_delta(run)  # tells now if there is none
        steps.append(lambda listen: drift_of_run(run, template, listen=listen, **options))
    return steps


def _about_judge(run: Path, chosen: Judge, questions: Path | None, options: dict[str, Any]) -> list[Step]:
    from beear.judge import harmful_samples, judge_run
    from beear.runs import read_settings
    from beear.usefulness import grade_run, read_questions

    asked = read_questions(questions)
    steps: list[Step] = [lambda listen: grade_run(run, chosen, asked, listen=listen, **options)]
    if read_settings(run)["config"].get("behaviour") != "insecure code":  # of code there is no harm to be scored
        harmful_samples(run)
        steps.insert(0, lambda listen: judge_run(run, chosen, listen))
    return steps


def _about_tasks(run: Path, tasks: str, include: str | None, options: dict[str, Any]) -> list[Step]:
    from beear.harness import Asked, evaluate_run, read_tasks, task_manager

    asked = Asked(read_tasks(tasks), include)
    task_manager(asked)
    return [lambda listen: evaluate_run(run, asked, listen=listen, **options)]


NOTHING_KEPT = "nothing was kept"


@contextlib.contextmanager
def _going_on(kept: str = "answers so far are kept") -> Iterator[None]:
    """Within the context an interrupt is answered with how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Failed(f"interrupted; {kept}, run the same command again") from stop


def _is_run(model: str, *given: object, preset: str) -> bool:
    """Whether MODEL is a finished run's folder. BadInput if anything is given that such a run has of its own."""
    found = (Path(model) / "results.json").is_file()
    if found and (preset != "default" or any(value is not None for value in given)):
        raise BadInput(f"{model} is a run folder, measured with its own settings; leave out all but the --trigger")
    return found


def _add_trigger(run: Path, template: str, *, quiet: bool, **options: Any) -> None:
    from beear.console import Reporter
    from beear.job import add_triggered

    judged = _is_judged(run)
    with Reporter(quiet) as reporter, _going_on(NOTHING_KEPT):
        add_triggered(run, template, listen=reporter, **options)
    _show_run(run, judged)


def _is_judged(run: Path) -> bool:
    return (run / "judged.jsonl").exists()


def _show_run(run: Path, judged: bool) -> None:
    """What was measured of a run, and whether what a judge had said of it before was let go."""
    from beear.console import metric_table
    from beear.runs import read_results

    results = read_results(run)
    _print(metric_table(results["before"], results["after"], f"{run}: before and after"))
    if judged and not _is_judged(run):
        typer.echo("what a judge said was of other replies; run `beear judge` again, answers to the same are kept")
    typer.echo(f"report: {run / 'report.html'}")


def _config(preset: str, file: Path | None, sets: list[str] | None, seed: int | None) -> Config:
    from beear.config import load_config

    return load_config(preset, file, [*(sets or []), *([] if seed is None else [f"seed={seed}"])])


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

    from beear.job import check_order, run_settings
    from beear.runs import Run, read_results

    found = read_results(out)
    if (found.get("model"), found.get("trigger")) != (model, trigger) or not (out / DEMO).exists():
        return
    check_order(run_settings(model, False, settings), out, settings, device, trust_remote_code=False)
    with Run.existing(out):
        shutil.rmtree(out)


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


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


def _stop(code: int, message: str) -> NoReturn:
    if ranks.is_first() or code == 1:  # all ranks find the same bad input and the same verdict
        try:
            typer.echo(printable(f"beear: {message}"), err=True)
        except KeyboardInterrupt:  # a second one, while the first is being answered
            typer.echo(printable(f"beear: {message}"), err=True)
    sys.exit(code)
