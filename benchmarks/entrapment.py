"""Cached entrapment beside the plain loop, on the embedded model: seconds of an inner step, in one process, in turn.

    python benchmarks/entrapment.py

Default settings (16 rows: 8 requests with 2 answers of 12 tokens), with the defender's own requests and with prompts
of 256 tokens. Plain: every row runs through all blocks; with a shared start, the template's first tokens run once for
all rows, as everywhere in a cleansing. Writes benchmarks/results/entrapment.json: medians, their ratios, and the
once-per-batch cost.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from stored import write

from beear.allocator import keep_freed_memory
from beear.cached import run_unperturbed
from beear.cleansing import Subject, backpropagate, entrap_batch, entrap_objective, frozen, plain_pass, start_delta
from beear.config import Config
from beear.defender import contrast
from beear.losses import response_logits
from beear.models import load
from beear.sets import read_sets
from beear.training import add_lora, cast_frozen, merged

RESULTS = Path(__file__).parent / "results" / "entrapment.json"
TURNS = 7
LONG = 256
"""Tokens of a long prompt."""


def main() -> None:
    keep_freed_memory()
    config = Config()
    model, tokenizer = load("embedded", device="cpu")
    model = add_lora(model, config.harden.lora_rank, (), 0)
    cast_frozen(model)
    subject = Subject(model, tokenizer, config)
    requests = read_sets(config).train[: config.entrap.batch]
    filler = "This is some background that the request comes with. "
    found = {}
    for name, before in {"default": "", f"{LONG} tokens": filler * 21}.items():
        chosen = [contrast(tokenizer, i, replace(r, text=before + r.text), config) for i, r in enumerate(requests)]
        batch = entrap_batch(tokenizer, chosen, config.entrap)
        delta = start_delta(config.entrap, model, 50.0, torch.Generator().manual_seed(0)).requires_grad_(True)
        with frozen(model):
            started = time.monotonic()
            cached = run_unperturbed(model, batch, subject.layer, answers=2)
            once = time.monotonic() - started

            def plain(batch=batch, delta=delta) -> float:  # type: ignore[no-untyped-def]
                run = partial(response_logits, model, batch)
                return backpropagate(subject, batch, delta, run, entrap_objective(config.entrap.away))

            def shared(batch=batch, delta=delta) -> float:  # type: ignore[no-untyped-def]
                run = plain_pass(subject, batch)
                return backpropagate(subject, batch, delta, run, entrap_objective(config.entrap.away))

            def fast(batch=batch, delta=delta, cached=cached) -> float:  # type: ignore[no-untyped-def]
                run = partial(cached.logits, model)
                return backpropagate(subject, batch, delta, run, entrap_objective(config.entrap.away))

            seconds = {"plain": [], "shared start": [], "cached": []}  # type: dict[str, list[float]]
            losses = {}
            for _ in range(TURNS):
                for kind, run in {"plain": plain, "shared start": shared, "cached": fast}.items():
                    with merged(subject.blocks[subject.layer :] if kind == "cached" else ()):  # once in a round
                        spent, losses[kind] = timed(run)
                    seconds[kind].append(spent)
        medians = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
        found[name] = {
            "prompt_tokens": max(len(c.prompt.ids) for c in chosen),
            **medians,
            "ratio": medians["plain"] / medians["cached"],
            "ratio to shared start": medians["shared start"] / medians["cached"],
            "once_per_batch": once,
            "losses": losses,
        }
        print(name, json.dumps(found[name]), flush=True)
    write(RESULTS, "python benchmarks/entrapment.py", {"threads": torch.get_num_threads(), "prompts": found})


def timed(run: Callable[[], float]) -> tuple[float, float]:
    started = time.monotonic()
    value = run()
    return time.monotonic() - started, value


if __name__ == "__main__":
    main()
