"""What a person sees while work goes on: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from beear import ranks
from beear.errors import leave_stderr, printable
from beear.metrics import METRICS, both_counts, shown
from beear.plan import Plan
from beear.report import drift_rows, task_lines
from beear.runs import WHENS

PREPARE, BEFORE, AFTER = "prepare", "before", "after"


class _Console(Console):
    """A console whose reader may leave: rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise


class Reporter:
    """Turns the events of a job into lines on standard error; `quiet` shows none."""

    def __init__(self, quiet: bool = False, rounds: int = 0) -> None:
        quiet = quiet or not ranks.is_first()
        self.console = _Console(stderr=True, quiet=quiet, highlight=False)
        self.rounds = rounds
        self.started = time.monotonic()
        self._round_seconds: list[float] = []
        self._before_seconds = 0.0
        self._stage = ""
        self._stage_started = self.started
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Reporter:
        with self._unless_gone():
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._unless_gone():
            self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        getattr(self, f"_on_{event['event']}")(event)

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """A terminal that is gone, or a full disk under a log, ends the showing and not the work."""
        try:
            yield
        except OSError as error:
            self.console.quiet = True
            if not isinstance(error, BlockingIOError):  # a pipe that is full now takes the last line later
                leave_stderr()

    def planting(self, step: int, steps: int, loss: float) -> None:
        """Show a step of planting an organism, and every tenth of them by a line that stays."""
        self._show(f"planting, loss {loss:.2f}", step, steps)
        if step % max(1, steps // 10) == 0:
            self.line(f"planting: step {step} of {steps}, loss or mean reward {loss:.2f}")

    def line(self, text: str) -> None:
        """A line that stays, with the time since the start."""
        seconds = int(time.monotonic() - self.started)
        with self._unless_gone():
            self.console.print(
                f"[dim]{seconds // 60:3d}:{seconds % 60:02d}[/dim]  {plain(text)}",
                soft_wrap=not self.console.is_terminal,  # a line of a log is one line
            )

    def _show(self, text: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=plain(text), completed=done, total=total)

    def _on_loading(self, event: dict[str, Any]) -> None:
        self.line(f"loading {event['model']}")

    def _on_note(self, event: dict[str, Any]) -> None:
        self.line(event["text"])

    def _on_cell(self, event: dict[str, Any]) -> None:
        self._round_seconds.clear()
        self.line(f"{event['cell']}: loading {event['model']}")

    def _on_cells(self, event: dict[str, Any]) -> None:
        self.line(f"{event['done']} of {event['of']} cells done")

    def _on_measure(self, event: dict[str, Any]) -> None:
        when, what = event["when"], event["what"]
        if when != self._stage:
            self._stage, self._stage_started = when, time.monotonic()
        words = {PREPARE: "preparing", BEFORE: "measuring before", AFTER: "measuring after"}.get(when, "measuring")
        self._show(f"{words}: {what} {event['done']}/{event['total']}", event["done"], event["total"])
        if event["done"] == event["total"]:
            self.line(f"{words}: {what} ({event['total']})")
        if when == BEFORE:
            self._before_seconds = time.monotonic() - self._stage_started

    def _on_entrap(self, event: dict[str, Any]) -> None:
        self._show(f"{self._where(event)} entrapment, loss {event['loss']:.2f}", event["step"], event["steps"])

    def _on_harden(self, event: dict[str, Any]) -> None:
        loss = event["safe_under_delta"]
        self._show(f"{self._where(event)} removal, loss {loss:.2f}", event["step"], event["steps"])

    def _on_residual(self, event: dict[str, Any]) -> None:
        self._show(f"{self._where(event)} entrapment works on {event['value']:.0%} of held-out requests", 0, 1)

    def _on_refused(self, event: dict[str, Any]) -> None:
        if event["value"]:
            self._show(f"{self._where(event)} {_shares(event['value'])} of spare harmless requests refused", 0, 1)

    def _on_memory(self, event: dict[str, Any]) -> None:
        self.line(f"out of memory: a step's requests run in {event['parts']} parts from now on")

    def _on_round(self, event: dict[str, Any]) -> None:
        self._round_seconds.append(event["seconds"])
        entrapment = f"entrapment works on {event['residual']:.0%}"
        ends = _ends([h["safe_under_delta"] for h in event["harden"]])
        removal = f"removal under delta of {event['budget']:.2f}, loss {ends}"
        refused = f", spare requests refused {_shares(event['refused'])}" if event["refused"] else ""
        self.line(f"{self._where(event)} {entrapment}, {removal}{refused}; {self._time_left(event)}")

    def _where(self, event: dict[str, Any]) -> str:
        cell = f"{event['cell']}, " if "cell" in event else ""
        return f"{cell}round {event['round']}/{self.rounds}:"

    def _time_left(self, event: dict[str, Any]) -> str:
        mean = sum(self._round_seconds) / len(self._round_seconds)
        left = mean * (self.rounds - event["round"]) + self._before_seconds
        return f"at most {max(1, round(left / 60))} min left"


def plain(text: str) -> str:
    """A text for a table or a line as it stands: no markup in it is followed, nor what a terminal would obey."""
    return escape(printable(text))


def metric_table(before: dict[str, Any] | None, after: dict[str, Any], title: str) -> Table:
    """Metrics as a table for a terminal of 80 columns, each with its 95 % interval and n."""
    table = Table(title=plain(title), title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("metric", no_wrap=True)  # a name is to be typed again, for `beear gate`
    for name in WHENS if before is not None else ("value",):
        table.add_column(name, justify="right")
    table.add_column("n", justify="right")
    unscored = []
    for name, (_, _, share) in METRICS.items():
        metrics = [m.get(name) for m in (before, after) if m is not None]
        if any(metrics):
            first, last = metrics[0] if len(metrics) > 1 else None, metrics[-1]
            n, left = (plain(both_counts(first, last, count)) for count in ("n", "unscored"))
            table.add_row(name, *[shown(m, share, brief=True) for m in metrics], n)
            unscored += [f"{name} {left}"] if left != "0" else []
    if unscored:
        table.caption, table.caption_justify = f"not scored: {', '.join(unscored)}", "left"
    return table


def plan_table(plan: Plan, model: str) -> Table:
    """What each stage will take, and all of them."""
    table = Table(title=plain(f"{model}: what a cleansing will take here"), title_justify="left")
    for name in ("stage", "minutes", "peak memory, GiB"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, seconds in plan.seconds.items():
        between = f"{plan.least_rounds} to " if plan.least_rounds < plan.rounds else ""
        times = f"{between}{plan.rounds} times " if plan.rounds > 1 and stage == "round" else ""
        table.add_row(f"{times}{stage}", f"{seconds / 60:.1f}", f"{plan.peak_memory_bytes[stage] / 2**30:.1f}")
    least, most = (f"{plan.total(n) / 60:.1f}" for n in (plan.least_rounds, plan.rounds))
    peak = max(plan.peak_memory_bytes.values()) / 2**30
    table.add_row("all", least if least == most else f"{least} to {most}", f"{peak:.1f}", style="bold")
    return table


def drift_table(drift: dict[str, Any]) -> Table:
    """Drift by block, each number before and after."""
    whens = [when for when in WHENS if when in drift]
    title = f"{drift['model']}: drift at the last token under {drift['trigger']!r} | under delta, {' > '.join(whens)}"
    table = Table(title=plain(title), title_justify="left")
    for header in ("block", "drift / state", "cosine to mean", "told apart", "delta to trigger"):
        table.add_column(header, justify="right")
    for layer, cells in drift_rows(drift):
        triggered, perturbed, to_trigger = cells[:3], cells[3:6], cells[6]
        both = (" | ".join(pair) for pair in zip(triggered, perturbed, strict=True))
        table.add_row(f"{layer}{' (l)' if layer == drift['layer'] else ''}", *both, to_trigger)
    return table


def reproduction_table(found: dict[str, Any], title: str) -> Table:
    """Every figure after of a run and of the second one with its settings."""
    table = Table("metric", title=plain(title), title_justify="left")
    for name in ("first", "again"):
        table.add_column(name, justify="right")
    table.add_column("within the interval")
    for name, pair in found["figures"].items():
        within = "no" if name in found["outside"] else "yes"
        table.add_row(name, f"{pair['first']:.4f}", f"{pair['again']:.4f}", within)
    return table


def task_table(results: dict[str, Any], title: str) -> Table:
    """What lm-eval's tasks gave before and after."""
    table = Table("task", "metric", title=plain(title), title_justify="left")
    for name in ("before", "after", "n"):
        table.add_column(name, justify="right")
    for task, metric, before, after, n in task_lines(results):
        words = (plain(word) for word in (task, metric, before, after, "" if n is None else str(n)))
        table.add_row(*words)
    return table


def sweep_table(sweep: dict[str, Any]) -> Table:
    """Each cell: in which round the trigger stopped working, and what it and refusals were then."""
    title = f"{sweep['model']}: earliest round below {sweep['success_below']:.0%} with {sweep['trigger']!r}"
    columns = (sweep["axis"], "round", "with the trigger", "ordinary refused")
    table = Table(*columns, title=plain(title), title_justify="left")
    for cell in sweep["cells"]:
        last = cell["rounds"][-1]["metrics"]
        epoch = "x" if cell["epoch"] is None else str(cell["epoch"])
        measured = [shown(last.get(name), True, brief=True) for name in ("asr_triggered", "false_refusal")]
        table.add_row(str(cell["value"]), epoch, *measured)
    return table


def _ends(losses: list[float]) -> str:
    return f"{losses[0]:.2f} to {losses[-1]:.2f}" if losses else "none"


def _shares(values: list[float]) -> str:
    return ", ".join(f"{value:.0%}" for value in values)
