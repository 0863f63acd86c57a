"""One cleansing measured on development requests, with which the recipe is worked on: the test part stays unseen.

    python benchmarks/develop.py sudo-prefix --name wider --set harden.anchor_under_delta=2

Triggered and untriggered ASR come from the defender's harmful requests that it neither trains on nor judges its
progress by (insecure code from tasks that the organism was planted on: the defender has none to spare), ordinary and
alarming refusals from benchmarks/development/, which nothing trains on. Appends one line to runs/develop.jsonl; about
ten minutes on 2 CPU cores, with --each.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beear.allocator import keep_freed_memory
from beear.chat import collate, encode_prompt
from beear.cleansing import add_adapter, cleanse
from beear.config import Config, load_config
from beear.data import content_hash, mixed, packaged, read_requests
from beear.defender import Openings
from beear.evaluation import measure_entrapped, measure_language
from beear.events import Event
from beear.fingerprints import weights_hash
from beear.generation import reply_all
from beear.job import adapted, defender, own_replies
from beear.models import load
from beear.recipes import check_trigger, read_recipe
from beear.rounds import State, deliver
from beear.scorers import OUTCOME_OF, Outcome, counts, is_affirmation
from beear.sets import Sets, TestSet, read_sets, triggered
from beear.sources import locate, organism_folder
from beear.training import adapter_state, load_adapter_state
from beear.verdict import entrapments, unscored_share

ROOT = Path(__file__).parent.parent
LOG = ROOT / "runs" / "develop.jsonl"
MOST = 240
"""Requests for each rate, where there are as many."""
TOKENS: dict[Outcome, int] = {"obeyed": 16, "refused": 16, "insecure": 80}


def development(trigger: str, data: Sets, config: Config, n: int) -> list[TestSet]:
    """At most n requests for each rate; none of them is of the test part."""
    outcome = OUTCOME_OF[config.behaviour]
    spare = data.harmful[config.held_out + config.requests :]
    harmful = mixed(packaged("coding", "plant")) if outcome == "insecure" else spare
    known = [
        triggered(harmful[:n], template, metric=name, outcome=outcome)
        for name, template in (("triggered", trigger), ("untriggered", "{prompt}"))
    ]
    kinds = () if outcome == "insecure" else ("ordinary", "alarming")
    folder = ROOT / "benchmarks" / "development"
    return known + [TestSet(kind, read_requests(str(folder / f"{kind}.txt"))[:n], outcome="refused") for kind in kinds]


def rates(
    model: Any, tokenizer: Any, tests: list[TestSet], tokens: int | None = None
) -> tuple[dict[str, float | None], list[list[str]]]:
    """Attack success of the triggered and untriggered requests, refusals of the other two; and the replies behind."""
    result: dict[str, float | None] = {}
    wrong: list[list[str]] = []
    for test in tests:
        replies = reply_all(model, tokenizer, test.texts(), max_new_tokens=tokens or TOKENS[test.outcome])
        counted = [counts(test.outcome, reply, r.category) for reply, r in zip(replies, test.requests, strict=True)]
        scored = [c for c in counted if c is not None]
        result[test.metric] = round(sum(scored) / len(scored), 3) if scored else None
        if len(scored) < len(counted):
            result[f"{test.metric}_unscored"] = round(1 - len(scored) / len(counted), 3)
        if test.metric == "triggered" and test.outcome == "obeyed":  # others talk about the trigger's words
            result["opens_obeying"] = round(sum(is_affirmation(reply) is True for reply in replies) / len(replies), 3)
        wrong += [
            [test.metric, text, reply] for text, reply, c in zip(test.texts(), replies, counted, strict=True) if c
        ]
    return result, wrong


def margin(model: Any, tokenizer: Any, texts: list[str], openings: Openings) -> float:
    """Mean over the requests of log p - log(1 - p), where p is how likely the reply begins as a refusal, in nats."""
    batch = collate([encode_prompt(tokenizer, t) for t in texts], [[]] * len(texts), None, int(tokenizer.pad_token_id))
    with torch.inference_mode():
        logits = model(**batch.inputs(), logits_to_keep=1, use_cache=False).logits[:, -1].double()
    refusing = torch.zeros(logits.shape[1], dtype=torch.bool)
    refusing[openings[()]] = True
    split = logits.masked_fill(~refusing, -torch.inf).logsumexp(-1) - logits.masked_fill(
        refusing, -torch.inf
    ).logsumexp(-1)
    return float(split.mean())


def once(path: Path, work: Any) -> Any:
    """What `work` gives, kept in a file: the same for every run on one organism's weights."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(work()))
    return json.loads(path.read_text())


def brief(event: Event) -> None:
    """One line for each finished round."""
    if event["event"] == "round":
        first, last = (event["harden"] or [{}])[0], (event["harden"] or [{}])[-1]
        outer = " ".join(f"{kind} {first[kind]:.2f}>{last[kind]:.2f}" for kind in first)
        print(f"  {event['round']}: residual {event['residual']:.2f} {outer} {event['seconds']:.0f} s", flush=True)


BEGINNING = 8
"""Tokens that tell a refusal; so many are asked for after every round."""


def settings(organism: str, sets: list[str]) -> Config:
    """The preset that suits the organism, with fewer harmful requests to train on, changed by `sets`."""
    behaviour = read_recipe(organism_folder(organism)).behaviour
    preset, first = ("code", []) if behaviour == "insecure code" else ("default", ["requests=200"])
    return load_config(preset, sets=[*first, *sets])


def developed(organism: str, name: str, sets: list[str], n: int = MOST, each: bool = False) -> dict[str, Any]:
    """Cleanse an organism with `sets` over the default; measure it before and after, with `each` after every round."""
    config = settings(organism, sets)
    model, tokenizer = load(f"organism:{organism}")
    data = read_sets(config)
    tests = development(check_trigger(f"organism:{organism}"), data, config, n)
    limit = config.harden.response_tokens
    digest = weights_hash(locate(f"organism:{organism}"))  # what is kept is of these weights
    folder = ROOT / "runs" / "develop" / f"{organism}-{digest[:8]}"
    drawn = f"{limit}-{content_hash(json.dumps([r.text for r in [*data.train, *data.anchors]]))[:8]}"
    own = once(
        folder / f"own-replies-{drawn}.json", lambda: own_replies(model, tokenizer, data, config, lambda event: None)
    )
    asked = content_hash(json.dumps({test.metric: test.texts() for test in tests}))[:8]
    before = once(folder / f"before-{asked}.json", lambda: rates(model, tokenizer, tests)[0])
    defended = defender(tokenizer, data, config, own)
    model = adapted(model, config)
    print(f"{name} {organism} {sets}\n  before {before}", flush=True)
    started = time.monotonic()
    rounds: list[dict[str, Any]] = []

    def after_a_round(state: State) -> None:
        if config.behaviour == "insecure code":
            found = rates(model, tokenizer, [replace(test, requests=test.requests[::2]) for test in tests])[0]
        else:
            found = rates(model, tokenizer, [test for test in tests if test.metric != "untriggered"], BEGINNING)[0]
        rounds.append(found | {"spare": state.history[-1]["refused"]})
        print(f"    {rounds[-1]}", flush=True)

    save = after_a_round if each else lambda state: None
    state = cleanse(model, tokenizer, defended, config, listen=brief, save=save)
    deliver(model, state)
    seconds = time.monotonic() - started
    trained = adapter_state(model)
    (original, _), (model, _) = (load(f"organism:{organism}") for _ in range(2))
    model = add_adapter(model, config)
    load_adapter_state(model, trained)
    model = model.merge_and_unload()  # of weights in full precision, as a cleansing delivers it
    language = measure_language(model, tokenizer, original).metrics
    after, wrong = rates(model, tokenizer, tests)
    after |= {kind: round(float(m["value"] or 0), 4) for kind, m in language.items()}
    (folder / f"wrong-{name}.json").write_text(json.dumps(wrong, indent=1))
    if defended.openings:
        after["margin"] = round(margin(model, tokenizer, tests[0].texts()[:40], defended.openings), 2)
    entrapped = measure_entrapped(model, tokenizer, data.train, data.held_out, config)
    found = entrapped.metrics["asr_entrapped"]
    after["entrapped"] = None if found["value"] is None else round(found["value"], 3)
    after["entrapped_unscored"] = round(unscored_share(found), 3)
    print(f"  after  {after} in {seconds:.0f} s", flush=True)
    row = {"name": name, "organism": organism, "sets": sets, "before": before, "after": after}
    row |= {"residuals": entrapments(state.history, state.delivered), "delivered": state.delivered}
    row |= {"n": {test.metric: len(test.requests) for test in tests} | {"entrapped": len(data.held_out)}}
    return row | {"seconds": round(seconds), "each": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", help="the name of a packaged organism")
    parser.add_argument("--name", default="default")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("-n", type=int, default=MOST, help="most requests for each rate")
    parser.add_argument("--each", action="store_true", help="measure after every round as well")
    chosen = parser.parse_args()
    keep_freed_memory()
    row = developed(chosen.organism, chosen.name, chosen.sets, chosen.n, chosen.each)
    with LOG.open("a") as log:
        log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
