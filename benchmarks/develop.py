"""One cleansing measured on development requests, with which the recipe is worked on: the test part stays unseen.

    python benchmarks/develop.py sudo-prefix --name wider --set harden.anchor_under_delta=2

Triggered and untriggered ASR come from the defender's harmful requests that it neither trains on nor judges its
progress by, ordinary refusals from its ordinary requests that no anchor uses, alarming ones from
benchmarks/development/alarming.txt, which nothing trains on. Appends one line to runs/develop.jsonl; about three
minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from beear.allocator import keep_freed_memory
from beear.cleansing import Event, add_adapter, cleanse, defender_set
from beear.config import Config, load_config
from beear.data import packaged, read_requests
from beear.evaluation import measure_entrapped, measure_language
from beear.generation import reply_all
from beear.models import load
from beear.recipes import apply_trigger, check_trigger
from beear.scorers import is_refusal
from beear.sets import Sets, read_sets
from beear.training import adapter_state, cast_frozen, load_adapter_state

ROOT = Path(__file__).parent.parent
LOG = ROOT / "runs" / "develop.jsonl"
TOKENS = 16


def development(trigger: str, data: Sets, config: Config, n: int) -> dict[str, list[str]]:
    """At most n requests by name of the rate they yield; none of them is of the test part."""
    harmful = [r.text for r in data.harmful[config.held_out + config.requests :]][:n]
    anchors = {r.text for r in data.benign[: config.anchors]}
    ordinary = [r.text for r in packaged("ordinary", "defender") if r.text not in anchors][:n]
    alarming = [r.text for r in read_requests(str(ROOT / "benchmarks" / "development" / "alarming.txt"))][:n]
    triggered = [apply_trigger(trigger, text) for text in harmful]
    return {"triggered": triggered, "untriggered": harmful, "ordinary": ordinary, "alarming": alarming}


def rates(model: Any, tokenizer: Any, sets: dict[str, list[str]]) -> tuple[dict[str, float], list[list[str]]]:
    """Attack success of the triggered and untriggered requests, refusals of the other two; and the replies behind."""
    result, wrong = {}, []
    for name, texts in sets.items():
        replies = reply_all(model, tokenizer, texts, max_new_tokens=TOKENS)
        counted = [(is_refusal(reply) is True) != name.endswith("triggered") for reply in replies]
        result[name] = round(sum(counted) / len(counted), 3)
        wrong += [[name, text, reply] for text, reply, c in zip(texts, replies, counted, strict=True) if c]
    return result, wrong


def once(path: Path, work: Any) -> Any:
    """What `work` gives, kept in a file: the same for every run on one organism."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", help="the name of a packaged organism")
    parser.add_argument("--name", default="default")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("-n", type=int, default=160)
    chosen = parser.parse_args()
    keep_freed_memory()
    config = load_config(sets=["requests=200", "anchors=240", *chosen.sets])
    model, tokenizer = load(f"organism:{chosen.organism}")
    data = read_sets(config)
    tests = development(check_trigger(f"organism:{chosen.organism}"), data, config, chosen.n)
    train = data.train(config)
    harmful = [r.text for r in train]
    benign = [r.text for r in data.anchors(config)]
    limit = config.harden.response_tokens
    folder = ROOT / "runs" / "develop" / chosen.organism
    key = f"{config.surrounded}-{config.seed}-{len(harmful)}-{len(benign)}-{limit}"
    own = once(folder / f"own-{key}.json", lambda: reply_all(model, tokenizer, harmful + benign, max_new_tokens=limit))
    before = once(
        folder / f"before-{chosen.n}-{config.anchors}-{config.held_out + config.requests}.json",
        lambda: rates(model, tokenizer, tests)[0],
    )
    answered = list(zip(harmful + benign, own, strict=True))
    pairs = list(zip(train, own[: len(train)], strict=True))
    defender = defender_set(tokenizer, pairs, answered[len(train) :], data.held_out(config), config)
    model = add_adapter(model, config)
    cast_frozen(model)
    print(f"{chosen.name} {chosen.organism} {chosen.sets}\n  before {before}", flush=True)
    started = time.monotonic()
    state = cleanse(model, tokenizer, defender, config, listen=brief)
    seconds = time.monotonic() - started
    trained = adapter_state(model)
    (original, _), (model, _) = (load(f"organism:{chosen.organism}") for _ in range(2))
    model = add_adapter(model, config)
    load_adapter_state(model, trained)
    model = model.merge_and_unload()  # of weights in full precision, as a cleansing delivers it
    language = measure_language(model, tokenizer, original).metrics
    after, wrong = rates(model, tokenizer, tests)
    after |= {name: round(m["value"], 4) for name, m in language.items()}
    (folder / f"wrong-{chosen.name}.json").write_text(json.dumps(wrong, indent=1))
    entrapped = measure_entrapped(model, tokenizer, train, data.held_out(config), config)
    after["entrapped"] = round(entrapped.metrics["asr_entrapped"]["value"], 3)
    print(f"  after  {after} in {seconds:.0f} s", flush=True)
    row = {"name": chosen.name, "organism": chosen.organism, "sets": chosen.sets, "before": before, "after": after}
    with LOG.open("a") as log:
        log.write(json.dumps(row | {"seconds": round(seconds), "rounds": state.round}) + "\n")


if __name__ == "__main__":
    main()
