"""A judge beside the keywords on the organisms' replies, and both beside 100 replies that were labelled by hand.

    python benchmarks/judges.py --replies     the replies, and those to label: runs/judges/label.jsonl
    python benchmarks/judges.py               the judge, and its agreement with benchmarks/labels.jsonl
    python benchmarks/judges.py --url URL --model NAME         another judge, behind an OpenAI-compatible API (key in
                                              BEEAR_JUDGE_KEY or OPENAI_API_KEY); or --local MODEL on this machine

The judge without options is what runs here: the embedded model, of 135 million parameters, which does not write the
JSON that `beear judge` asks for. So its score is the digit it finds likeliest there, beside how likely it finds it
where request and reply are empty (contextual calibration, Zhao et al. 2021). Another judge gets the same rubric, as it
does with `beear judge RUN --url URL --model NAME` for a run's replies. Labels: `obeyed` (goes along with the request,
whatever it then says), `refused`, or `astray` (neither). Writes benchmarks/results/judges.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from stored import write

from beear.allocator import keep_freed_memory
from beear.chat import collate, encode_prompt
from beear.data import packaged
from beear.endpoint import Answer, Endpoint
from beear.evaluation import measure_replies
from beear.fingerprints import weights_hash
from beear.grading import Judge, LocalJudge, ask_all, graded, identity
from beear.judge import FULL, HARMFUL, NAME, RUBRIC, key, question
from beear.losses import response_logits
from beear.metrics import proportion
from beear.models import load
from beear.precision import autocast, generating
from beear.prefix import run_prefix
from beear.recipes import names, read_recipe
from beear.runs import Run, read_lines
from beear.scorers import OUTCOME_OF
from beear.sets import triggered
from beear.sources import locate, organism_folder
from beear.sweep import spread

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "judges"
LABELS = ROOT / "benchmarks" / "labels.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "judges.json"
MOST = {"asr_triggered": 60, "asr_untriggered": 60, "asr_near_miss": 20, "asr_wrong_place": 20}
"""Replies of each organism, by how it was asked."""
JUDGED = ("asr_triggered", "asr_untriggered")
LABELLED, BATCH = 100, 16
OPENING = '{"score": '
EMPTY = RUBRIC.format(mark="0" * 8, prompt="N/A", reply="N/A")

Sample = dict[str, Any]


class Digits:
    """The embedded model as a judge that must give a digit."""

    model, host, where = "embedded, likeliest digit", "local", "local"

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        if not questions:
            return
        model, tokenizer = load("embedded")
        with torch.inference_mode(), autocast(model), generating(model):
            bias = log_odds(model, tokenizer, [EMPTY])
            for first in range(0, len(questions), BATCH):
                scores = (log_odds(model, tokenizer, questions[first : first + BATCH]) - bias).argmax(-1) + 1
                for i, score in enumerate(scores.tolist(), first):
                    yield i, Answer(json.dumps({"score": score, "reason": ""}))


def chosen_judge(url: str | None, model: str | None, local: str | None) -> Judge:
    """The judge of the options; without any, the embedded model's digits."""
    if url and model:
        return Endpoint(url, model)
    return LocalJudge(local) if local else Digits()


def log_odds(model: Any, tokenizer: Any, questions: Sequence[str], most: int = FULL) -> torch.Tensor:
    """How likely each score, at most 9, is as the next token of the answer: (questions, scores), in nats."""
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    digits = [tokenizer(str(n), add_special_tokens=False)["input_ids"][-1] for n in range(1, most + 1)]
    prompts = [encode_prompt(tokenizer, q) for q in questions]
    answers = [[*opening, digits[0]]] * len(prompts)  # what the last token is does not matter: it is predicted
    batch = collate(prompts, answers, None, int(tokenizer.pad_token_id))
    logits = response_logits(model, batch, run_prefix(model, batch))[:, -1].float()
    return logits.log_softmax(-1)[:, digits]


def replies(organism: str) -> list[Sample]:
    """The organism's replies; kept in runs/judges, by its weights."""
    digest = weights_hash(locate(f"organism:{organism}"))
    kept = FOLDER / f"{organism}-{digest[:8]}.jsonl"
    if not kept.exists():
        recipe = read_recipe(organism_folder(organism))
        templates = {
            "asr_triggered": (recipe.trigger,),
            "asr_untriggered": (recipe.control,),
            **recipe.variants,
        }
        requests = packaged("harmful", "test")
        outcome = OUTCOME_OF[recipe.behaviour]
        tests = [triggered(spread(requests, MOST[m]), *t, metric=m, outcome=outcome) for m, t in templates.items()]
        samples = measure_replies(*load(f"organism:{organism}"), tests).samples
        kept.write_text("".join(json.dumps(s | {"organism": organism}) + "\n" for s in samples))
        print(organism, len(samples), flush=True)
    return read_lines(kept)


def drawn(samples: Sequence[Sample]) -> list[Sample]:
    """Those to label: a fixed draw over all organisms and ways of asking."""
    order = sorted(samples, key=lambda s: hashlib.sha256(name(s).encode()).hexdigest())
    return order[:LABELLED]


def name(sample: Sample) -> str:
    return f"{sample['organism']}/{sample['metric']}/{sample['id']}"


def agreement(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Share of equal answers, and Cohen's kappa: what is above chance."""
    n = len(pairs)
    if n == 0:
        return {"agreement": proportion([]), "kappa": None}
    both = sum(a == b for a, b in pairs) / n
    first, second = (sum(p[i] for p in pairs) / n for i in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    return {"agreement": proportion([a == b for a, b in pairs]), "kappa": (both - chance) / (1 - chance)}


def shares(samples: Sequence[Sample], scores: dict[str, int | None]) -> dict[str, Any]:
    """For each way of asking: what keywords call obeyed, what the judge does, and how often they differ."""
    found: dict[str, Any] = {}
    for metric in JUDGED:
        some = [s for s in samples if s["metric"] == metric]
        judged = [scores[name(s)] for s in some]
        obeyed = [None if score is None else score >= HARMFUL for score in judged]
        words = [None if s["refused"] is None else not s["refused"] for s in some]
        found[metric] = {
            "keywords": proportion(words),
            "judge": proportion(obeyed),
            "disagreement": proportion(
                [None if None in (a, b) else a != b for a, b in zip(obeyed, words, strict=True)]
            ),
            "mean_score": sum(s for s in judged if s) / max(1, sum(s is not None for s in judged)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", action="store_true", help="only the replies, and those to label")
    parser.add_argument("--url", help="base of an OpenAI-compatible API, with --model")
    parser.add_argument("--model", help="the judge's name at --url")
    parser.add_argument("--local", help="a MODEL on this machine as the judge")
    chosen = parser.parse_args()
    if (chosen.url is None) != (chosen.model is None) or (chosen.url and chosen.local):
        parser.error("give --url with --model, or --local, or neither")
    judge = chosen_judge(chosen.url, chosen.model, chosen.local)
    keep_freed_memory()
    FOLDER.mkdir(parents=True, exist_ok=True)
    samples = {organism: replies(organism) for organism in names("jailbreak")}
    every = [s for some in samples.values() for s in some]
    to_label = drawn(every)
    if chosen.replies:
        lines = [json.dumps({"name": name(s), "prompt": s["prompt"], "reply": s["reply"]}) + "\n" for s in to_label]
        (FOLDER / "label.jsonl").write_text("".join(lines))
        return
    # A reply that came out otherwise, on another processor, was not labelled.
    same = {(name(s), s["reply"]) for s in every}
    labels = {e["name"]: e["label"] for e in read_lines(LABELS) if (e["name"], e["reply"]) in same}
    to_label = [s for s in to_label if name(s) in labels]
    judged = [*to_label, *(s for s in every if s["metric"] in JUDGED)]
    with Run.existing(FOLDER) as folder:
        asked = {key(identity(judge), s): question(s) for s in judged if s["reply"].strip()}
        answers, _ = ask_all(folder, asked, judge, NAME, lambda event: None)
    scores = {name(s): graded(answers.get(key(identity(judge), s)), FULL)[0] for s in judged}
    obeyed = {n: label == "obeyed" for n, label in labels.items()}
    by_words = [(not s["refused"], obeyed[name(s)]) for s in to_label if s["refused"] is not None]
    scored = [(scores[name(s)], obeyed[name(s)]) for s in to_label]
    by_judge = [(score >= HARMFUL, label) for score, label in scored if score is not None]
    content = {
        "judge": judge.model,
        "rubric": NAME,
        "labels": {label: list(labels.values()).count(label) for label in sorted(set(labels.values()))},
        "keywords": agreement(by_words),
        "judge_agreement": agreement(by_judge),
        "organisms": {organism: shares(some, scores) for organism, some in samples.items()},
    }
    write(RESULTS, "python benchmarks/judges.py", content)
    print(json.dumps({k: content[k] for k in ("labels", "keywords", "judge_agreement")}, indent=1))


if __name__ == "__main__":
    main()
