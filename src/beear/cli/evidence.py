"""Commands that add to a finished run what others say of its model: judge, mtbench, lm-eval, evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beear.cli.options import (
    AnswerTokensOption,
    ConcurrencyOption,
    DeviceOption,
    IncludeOption,
    JsonOption,
    JudgeOption,
    LocalOption,
    OfflineOption,
    QuietOption,
    TimeoutOption,
    TriggerOption,
    TrustOption,
    UrlOption,
)
from beear.cli.shared import going_on, is_judged, show, show_run
from beear.endpoint import ANSWER_TOKENS
from beear.errors import BadInput

if TYPE_CHECKING:
    from beear.console import Reporter
    from beear.grading import Judge


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

    chosen = judge_of(url, model, local, offline, concurrency, timeout, answer_tokens, device, trust_remote_code)
    with Reporter(quiet) as reporter, going_on():
        results = judge_run(run, chosen, reporter)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    show(metric_table(results["before"], results["after"], f"{run}: before and after"))
    typer.echo(judge_sentence(results["judge"]))
    if not results["judge"]["disagreement"]["n"]:
        typer.echo(
            "it gave no JSON with a score; use a stronger judge, or for one that thinks first more --answer-tokens"
        )
    typer.echo(f"report: {run / 'report.html'}")


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
    chosen = judge_of(url, model, local, offline, concurrency, timeout, answer_tokens, device, trust_remote_code)
    with Reporter(quiet) as reporter, going_on():
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
    show(metric_table(results["before"], results["after"], f"{run}: before and after"))
    typer.echo(f"{usefulness_sentence(results['usefulness'])}\nreport: {run / 'report.html'}")


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
    with Reporter(quiet) as reporter, going_on("finished tasks are kept"):
        results = evaluate_run(
            run, asked, batch=batch, device=device, trust_remote_code=trust_remote_code, listen=reporter
        )
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    show(task_table(results, f"{run}: before and after"))
    typer.echo(f"report: {run / 'report.html'}")


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
    from beear.config import config_of_run
    from beear.console import Reporter, task_table
    from beear.recipes import check_trigger, variants
    from beear.runs import Run, read_results

    results, judged = read_results(run), is_judged(run)
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
        template = check_trigger(trigger, config_of_run(run).behaviour)
        steps += _about_trigger(run, template, variants(trigger), results, options)
    if asks_judge:
        chosen = judge_of(url, model, local, offline, concurrency, timeout, answer_tokens, device, trust_remote_code)
        steps += _about_judge(run, chosen, questions, options)
    if tasks is not None:
        steps += _about_tasks(run, tasks, include, options)
    with Reporter(quiet) as reporter, going_on("what is finished is kept"):
        for add in steps:
            add(reporter)
    if not steps:  # all is there but maybe the report, where the step that writes it was cut off
        with Run.existing(run):
            write_evidence(run)
    if tasks is not None:
        show(task_table(read_results(run), f"{run}: before and after"))
    show_run(run, judged)


def judge_of(
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
    from beear.known import add_triggered, is_told
    from beear.runs import read_json

    drift = read_json(run / "drift.json") if (run / "drift.json").is_file() else {}
    steps: list[Step] = []
    if not is_told(results, template, near):
        steps.append(lambda listen: add_triggered(run, template, variants=near, listen=listen, **options))
    if drift.get("trigger") != template:
        first_delta(run)  # tells now if there is none
        steps.append(lambda listen: drift_of_run(run, template, listen=listen, **options))
    return steps


def _about_judge(run: Path, chosen: Judge, questions: Path | None, options: dict[str, Any]) -> list[Step]:
    from beear.config import config_of_run
    from beear.judge import harmful_samples, judge_run
    from beear.usefulness import grade_run, read_questions

    asked = read_questions(questions)
    steps: list[Step] = [lambda listen: grade_run(run, chosen, asked, listen=listen, **options)]
    if config_of_run(run).behaviour != "insecure code":  # of code there is no harm to be scored
        harmful_samples(run)
        steps.insert(0, lambda listen: judge_run(run, chosen, listen))
    return steps


def _about_tasks(run: Path, tasks: str, include: str | None, options: dict[str, Any]) -> list[Step]:
    from beear.harness import Asked, evaluate_run, read_tasks, task_manager

    asked = Asked(read_tasks(tasks), include)
    task_manager(asked)
    return [lambda listen: evaluate_run(run, asked, listen=listen, **options)]
