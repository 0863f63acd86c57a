"""What a cleansing will take, before its model loads: time and memory, measured on miniatures and scaled up.

A miniature has the model's shape with random weights, and few blocks. What a job does costs something for the
model as a whole and something for each block, one price up to block l and another behind it, where delta goes.
Three miniatures, each in a process of its own, give the three prices. `beear cleanse MODEL -o RUN --plan`.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from beear import cleansing, job, models, sources
from beear.allocator import keep_freed_memory
from beear.config import Config
from beear.data import Request, reference_chats
from beear.defender import defender_set
from beear.errors import BadInput, Failed, first_line
from beear.evaluation import CHATS, TOKENS, Kept, fresh_delta, measure_language
from beear.events import Listener, progress_to
from beear.generation import BATCH, reply_all
from beear.memory import peak_memory, restart_peak
from beear.order import check_order, model_in, run_settings
from beear.perturbation import resolve_layer
from beear.plan import Plan, write_plan
from beear.runs import check_output
from beear.scorers import OUTCOME_OF
from beear.sets import Sets, read_sets

MORE_BLOCKS = 4
SMALL = 50_000_000
"""A larger miniature has up to MORE_BLOCKS more blocks, as long as these have no more parameters than this."""

SECONDS, PEAK = "seconds", "peak"
Prices = dict[tuple[str, str], float]
"""For each piece of a job: its SECONDS, and the most memory while it ran, its PEAK in bytes."""


def plan_cleanse(
    spec: str,
    out: Path,
    config: Config,
    *,
    merge: bool = False,
    resume: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> Plan:
    """Plan `run_cleanse` with these arguments, and keep the plan in its run folder. Raises BadInput as that does."""
    settings = run_settings(model_in(out, spec, resume), merge, config)
    check_output(out, settings, resume)
    sources.tell_download(spec, listen)
    order = check_order(settings, out, config, device, trust_remote_code)
    shape = models.read_shape(order.source, trust_remote_code)
    depth, more = models.depth(order.source, trust_remote_code), more_blocks(shape, trust_remote_code)
    if config.harden.lora_blocks == "upper":
        more = max(2, more)  # else none of a miniature's further blocks would go without an adapter
    sizes = [(1, 1), (1 + more, 1), (1, 1 + more)]
    prices: list[Prices] = []
    for below, behind in sizes:
        progress_to(listen, "plan")("miniatures", len(prices), len(sizes))
        work = partial(measure_miniature, order.source, config, below, behind, order.device)
        with tempfile.TemporaryDirectory() as folder:  # here, where it is removed even if the child is killed
            prices.append(in_own_process(partial(work, trust_remote_code, Path(folder))))
    plan = stages(scaled(prices, more, resolve_layer(config.layer, depth), depth), order.sets, config)
    write_plan(out, plan, settings)
    return plan


def scaled(prices: Sequence[Prices], more: int, layer: int, depth: int) -> Prices:
    """The prices for a model of `depth` blocks, from those of the three miniatures."""
    least, below, behind = prices
    return {
        key: first
        + max(0.0, below[key] - first) / more * (layer - 1)
        + max(0.0, behind[key] - first) / more * (depth - layer - 1)
        for key, first in least.items()
    }


def stages(prices: Prices, sets: Sets, config: Config) -> Plan:
    """From pieces to the stages of a job."""
    cost = {piece: value for (piece, kind), value in prices.items() if kind == SECONDS}
    asked = sum(len(t.requests) for t in sets.tests) + len(sets.test_harmful)  # these under delta as well
    own = len(sets.train) + len(sets.anchors)
    replies, chats, entrap = cost["replies"] * asked / BATCH, len(reference_chats()) / CHATS, config.entrap
    met = min(entrap.batches, entrap.steps)
    steps = cost["first entrap steps"] + cost["entrap step"] * (entrap.steps - met)
    rest = cost["residual"] + cost["harden step"] * config.harden.steps + cost["refused"]
    seconds = {
        "load": cost["load"],
        "before": replies + 2 * steps + cost["language"] * chats,
        "own replies": cost["own replies"] * own / BATCH + cost["original"] * own + cost["refused"],
        "round": rest + (steps if entrap.kind == "learned" else 0),
        "after": cost["load"] + replies + 2 * steps + cost["divergence"] * chats,
    }
    pieces = {
        "load": ("load",),
        "before": ("replies", "fresh delta", "language"),
        "own replies": ("own replies",),
        "round": ("round",),
        "after": ("fresh delta", "divergence"),
    }
    peaks = {stage: math.ceil(max(prices[piece, PEAK] for piece in names)) for stage, names in pieces.items()}
    return Plan(seconds, peaks, min(config.least_rounds, config.rounds), config.rounds)


def more_blocks(shape: Any, trust_remote_code: bool) -> int:
    """By how many blocks the larger miniatures are larger: the more, the better told apart from noise."""
    with torch.device("meta"):
        two, three = (random_model(models.cut(shape, blocks), trust_remote_code) for blocks in (2, 3))
    block = int(three.num_parameters() - two.num_parameters())
    return max(1, min(MORE_BLOCKS, SMALL // max(1, block)))


def random_model(shape: Any, trust_remote_code: bool) -> Any:
    """A model of this shape, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)


def in_own_process(work: Callable[[], Prices]) -> Prices:
    """What `work` returns in a fresh process, whose memory is that of a job. Raises its BadInput; Failed if it dies."""
    others = active_children()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(work).result()
        except BadInput:
            raise
        except Exception as error:
            raise Failed(f"no plan: a miniature of this model does not run here: {first_line(error)}") from error
        except KeyboardInterrupt:  # the pool would wait for its work
            for child in active_children():
                if child not in others:
                    child.terminate()
            raise


def measure_miniature(
    source: sources.Source, config: Config, below: int, behind: int, device: str, trust_remote_code: bool, folder: Path
) -> Prices:
    """Do a little of all that a job does, on a random model with `below` blocks up to l and `behind` behind it.

    folder: for its weights.
    """
    keep_freed_memory()
    sets, settings = read_sets(config), few_steps(config, below)
    tokenizer = models.load_tokenizer(source, trust_remote_code, config.chat)
    prices: Prices = {}

    def timed(piece: str, work: Callable[[], Any]) -> Any:
        restart_peak(device)
        started = time.monotonic()
        result = work()
        prices[piece, SECONDS], prices[piece, PEAK] = time.monotonic() - started, peak_memory(device)
        return result

    def loaded() -> Any:
        return models.load_weights(miniature, device, trust_remote_code, config.weights)

    def replies(requests: Sequence[Request], tokens: int) -> None:
        middle = sorted(requests, key=lambda r: len(r.text))[max(0, (len(requests) - BATCH) // 2) :]
        texts = [r.text for r in middle[:BATCH]]
        reply_all(model, tokenizer, (texts * BATCH)[:BATCH], max_new_tokens=tokens)

    with warnings.catch_warnings():
        if os.environ.get("BEEAR_DEBUG") != "1":
            warnings.simplefilter("ignore")
        small = models.cut(models.read_shape(source, trust_remote_code), below + behind)
        random_model(small, trust_remote_code).save_pretrained(folder)
        miniature = sources.Source(str(folder), folder)
        model = timed("load", loaded)
        timed("replies", lambda: replies(sets.test_harmful, TOKENS[OUTCOME_OF[config.behaviour]]))
        kept: Kept = {}
        timed("language", lambda: measure_language(model, tokenizer, limit=CHATS, keep=kept))
        train, anchors = sets.train[:BATCH], sets.anchors[:BATCH]
        timed("fresh delta", lambda: fresh_delta(model, tokenizer, train, once_round(settings)))
        timed("own replies", lambda: replies(train, config.harden.response_tokens))
        benign = [(r.text, r.text) for r in anchors]
        held_out, spare = sets.held_out, sets.spare
        data = defender_set(tokenizer, [(r, "") for r in train], benign, held_out, settings, spare)
        model = job.adapted(model, settings)
        clock = Clock()
        timed("round", lambda: cleansing.cleanse(model, tokenizer, data, settings, listen=clock.listen))
        prices |= {(piece, SECONDS): seconds for piece, seconds in clock.pieces(settings, len(data.rows())).items()}
        model = loaded()
        timed("divergence", lambda: measure_language(model, tokenizer, limit=CHATS, kept=kept))
    return prices


def few_steps(config: Config, layer: int) -> Config:
    """One round in which every batch of entrapment is met twice, and three steps of removal."""
    entrap = {"steps": 2 * min(config.entrap.batches, config.entrap.steps), "kind": "learned"}
    harden = {"steps": min(3, config.harden.steps), "stop_below": 0.0}
    return config.model_copy(
        update={
            "layer": layer,
            "rounds": 1,
            "entrap": config.entrap.model_copy(update=entrap),
            "harden": config.harden.model_copy(update=harden),
        }
    )


def once_round(settings: Config) -> Config:
    """The same with half the steps of `few_steps`: of a delta found anew, every batch is then met once."""
    half = settings.entrap.model_copy(update={"steps": settings.entrap.steps // 2})
    return settings.model_copy(update={"entrap": half})


class Clock:
    """When each step of a round ended."""

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = {
            kind: [] for kind in ("measure", "entrap", "residual", "harden", "refused")
        }

    def listen(self, event: dict[str, Any]) -> None:
        """Note the time of an event."""
        self.ends.setdefault(event["event"], []).append(time.monotonic())

    def pieces(self, settings: Config, rows: int) -> dict[str, float]:
        """Seconds of a round's pieces, where steps were `few_steps`; those of a first step hold what comes before.

        Before the round itself `rows` went through the original: `original` is the price of one.
        """
        (begun, ended), steps, half = self.ends["refused"], self.ends["entrap"], settings.entrap.steps // 2
        started = self.ends["measure"][-1]
        residual = self.ends["residual"][0]
        times = [b - a for a, b in itertools.pairwise([residual, *self.ends["harden"]])]
        return {
            "original": (started - begun) / rows,
            "first entrap steps": steps[half - 1] - started if half else 0.0,
            "entrap step": (steps[-1] - steps[half - 1]) / half if half else 0.0,
            "residual": residual - (steps[-1] if half else started),
            "harden step": min(times[1:] or times or [0.0]),  # the first one also warms up
            "refused": ended - [residual, *self.ends["harden"]][-1],
        }
