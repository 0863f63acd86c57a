"""A bridge to EleutherAI's lm-eval (extra `lm-eval`): any of its tasks, on a run's model before and after.

Tasks, prompts and scores are lm-eval's own; beear loads the two models safely and keeps what comes out beside its other
evidence. Tasks may be of the user's own: a folder of task files (`--include`), which works without a network.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beear.card import write_evidence
from beear.errors import BadInput, Failed, first_line
from beear.events import Listener
from beear.hashes import file_hash, json_hash
from beear.metrics import Z95, Metric
from beear.runs import Run, read_results


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how; None and False leave lm-eval's own ways."""

    tasks: tuple[str, ...]
    include: str | None = None
    """A folder of task files beside lm-eval's own. They may bring Python code: take only such as you trust."""
    limit: int | None = None
    """Only the first so many items of each task."""
    shots: int | None = None
    chat: bool = False
    """Put each item into the model's chat template."""

    def digest(self, task: str) -> str:
        """SHA-256 over the task, how it is asked, lm-eval's version and every file of `include`.

        Data that a task reads from elsewhere is not covered.
        """
        folder = Path(self.include) if self.include else None
        own = sorted(p for p in folder.rglob("*") if p.is_file() and is_given(p.relative_to(folder))) if folder else []
        files = [(str(p.relative_to(folder or p)), file_hash(p)) for p in own]
        how = [task, self.limit, self.shots, self.chat, version("lm_eval"), files]
        return json_hash(how)


def is_given(path: Path) -> bool:
    """Whether a file of a folder of tasks is one of the user's: hidden ones, and what Python compiles, are not."""
    return not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def evaluate_run(
    path: Path,
    asked: Asked,
    *,
    batch: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Run the tasks on a finished run's model before and after; adds `lm_eval` to results.json and the report.

    Each finished task of either model is kept, and other tasks' results stay. Raises BadInput before a model loads
    if this is no such run or lm-eval knows no such task.
    """
    read_results(path)  # tells if there are none
    manager = task_manager(asked)
    with Run.existing(path) as run:
        from beear.before_after import kept_before_and_after  # brings torch

        found = kept_before_and_after(
            run,
            {f"lm-eval-{asked.digest(task)[:12]}": task for task in asked.tasks},
            lambda task, when, model, tokenizer: run_task(model, tokenizer, task, asked, manager, batch),
            device=device,
            trust_remote_code=trust_remote_code,
            listen=listen,
        )
        results = read_results(path)
        entries = dict(results.get("lm_eval", {}))
        for task in asked.tasks:
            entries |= paired(found[task]["before"], found[task]["after"], asked)
        results["lm_eval"] = dict(sorted(entries.items()))
        run.write_json("results.json", results)
        write_evidence(path)
    return results


def task_manager(asked: Asked) -> Any:
    """lm-eval's list of tasks. Raises BadInput if it is not installed, or has no such task."""
    if asked.include is not None and not Path(asked.include).is_dir():
        raise BadInput(f"--include {asked.include}: no such folder; give one that holds lm-eval's task files")
    manager = index(asked.include)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise BadInput(f"lm-eval has no task {name!r}; {hint}")
    return manager


@functools.cache
def index(include: str | None) -> Any:
    """lm-eval's tasks and those of a folder; read once in a process, since that takes ten seconds and more."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput("lm-eval is not there; install beear with its extra lm-eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include)


def run_task(model: Any, tokenizer: Any, task: str, asked: Asked, manager: Any, batch: int) -> dict[str, Any]:
    """The task's (or, of a group, each subtask's) metrics as lm-eval gives them, with standard errors and n."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from beear.chat import settled, with_template  # brings torch

    try:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=with_template(tokenizer, settled(tokenizer)), batch_size=batch),
            tasks=[task],
            num_fewshot=asked.shots,
            limit=asked.limit,
            apply_chat_template=asked.chat,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise Failed(f"lm-eval could not run {task}: {first_line(error)}") from error
    counts = found.get("n-samples", {})
    return {
        name: {metric: measured(values, metric, counts.get(name, {}).get("effective")) for metric in named(values)}
        for name, values in found["results"].items()
    }


SHARES = ("acc", "exact_match", "f1", "pass@")
"""How the names of metrics begin that lie between 0 and 1."""


def named(values: dict[str, Any]) -> Iterator[str]:
    """The metrics among what lm-eval says of a task, as it spells them: `acc,none`."""
    for name, value in values.items():
        if "," in name and "_stderr," not in name and isinstance(value, int | float):
            yield name


def measured(values: dict[str, Any], name: str, n: int | None) -> Metric:
    """Value and 95 % interval, a normal one of lm-eval's standard error; none where that is not given, or zero."""
    value, error = float(values[name]), values.get("_stderr,".join(name.split(",", 1)))
    half = Z95 * error if isinstance(error, int | float) else 0.0
    low, high = (value - half, value + half) if half > 0 else (None, None)
    if low is not None and high is not None and name.startswith(SHARES):
        low, high = max(0.0, low), min(1.0, high)
    return {"value": value, "low": low, "high": high, "n": n, "unscored": 0}


def paired(before: dict[str, Any], after: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """For each task its metrics before and after, and how it was asked."""
    how = {"limit": asked.limit, "shots": asked.shots, "chat": asked.chat, "lm_eval": version("lm_eval")}
    return {
        task: {"metrics": {name: {"before": old, "after": after[task][name]} for name, old in metrics.items()}, **how}
        for task, metrics in before.items()
        if metrics
    }


def read_tasks(text: str) -> tuple[str, ...]:
    """Names between commas. Raises BadInput if there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadInput("--tasks names no task; for example --tasks arc_easy,hellaswag")
    return tuple(dict.fromkeys(names))
