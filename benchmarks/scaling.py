"""What a step costs, over prompt length, reply length, layer and model size, and what that says of 7B parameters.

    python benchmarks/scaling.py

Llama-shaped models with random weights, default batches; one thing is changed at a time around the embedded model's
shape (64 tokens of the user's words, replies of 8, l at 5/6 of the depth). Seconds are medians of the real loops.
Both kinds of step are fitted by seconds = a + b * operations, operations counted from the shapes (`operations`).
Writes benchmarks/results/scaling.json; about ten minutes on 2 CPU cores with AMX. Goes on where it was interrupted.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from stored import write
from transformers import LlamaConfig, LlamaForCausalLM

from beear.allocator import keep_freed_memory
from beear.chat import Prompt
from beear.cleansing import Subject, add_adapter, entrap, harden
from beear.config import Config
from beear.defender import Benign, DefenderSet, Harmful
from beear.draws import Draws
from beear.events import Event
from beear.training import cast_frozen

RESULTS = Path(__file__).parent / "results" / "scaling.json"
VOCABULARY, SYSTEM, STEPS = 49152, 24, 4
SHAPES = {
    "10M": (128, 384, 16),
    "23M": (256, 704, 12),
    "77M": (512, 1408, 16),
    "135M": (576, 1536, 30),
    "358M": (1024, 2816, 24),
}
"""Hidden size, size of the MLP, blocks."""
H100 = 989e12 * 0.4
"""Operations a second of one H100 in bf16 without sparsity, of which 40 % are reached (an assumption)."""


@dataclass(frozen=True)
class Case:
    """What a step's cost depends on."""

    shape: str = "135M"
    prompt: int = 64
    reply: int = 8
    depth: float = 5 / 6

    def layer(self) -> int:
        """l."""
        return round(self.depth * SHAPES[self.shape][2])


def operations(
    case: Case, shape: tuple[int, int, int], vocabulary: int, layer: int, config: Config
) -> dict[str, float]:
    """Multiplications and additions of both kinds of step: 2 a parameter and token forward, 2 more backward.

    The weights take no gradient but through LoRA, and attention is left out: both are small at these lengths. Of the
    last block only keys and values are needed at positions that predict nothing.
    """
    width, inner_width, blocks = shape
    seen_by_others, rest = 2 * width**2, 2 * width**2 + 3 * width * inner_width
    block, head = seen_by_others + rest, vocabulary * width

    def behind(tokens: int, predicting: int) -> int:
        return tokens * ((blocks - layer) * block - rest) + predicting * rest

    asked, reply = config.entrap.batch, min(case.reply, config.entrap.response_tokens)
    inner = behind(asked * (case.prompt + 2 * reply), asked * (2 * reply - 1)) + 2 * asked * reply * head
    alone, tokens = config.harden.batch + config.harden.anchor_batch, case.prompt + case.reply
    below = tokens * alone * (layer - min(blocks // 2, layer)) * block  # what the original gives was run before
    outer = below + behind(2 * alone * tokens, 2 * alone * case.reply) + 2 * alone * case.reply * head
    return {"inner": 4.0 * inner, "outer": 4.0 * outer + 2 * alone * case.reply * head}


def measure(case: Case) -> dict[str, Any]:
    """Median seconds of an inner and an outer step of the real loops."""
    width, inner, blocks = SHAPES[case.shape]
    layer = case.layer()
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True, attn_implementation="eager"))
    config = Config(layer=layer)
    entrapment = {"steps": STEPS + 1, "batches": 1, "response_tokens": min(case.reply, config.entrap.response_tokens)}
    removal = {"steps": STEPS + 1, "stop_below": 0.0}
    config = config.model_copy(
        update={
            "entrap": config.entrap.model_copy(update=entrapment),
            "harden": config.harden.model_copy(update=removal),
        }
    )
    model = add_adapter(model.eval(), config)
    cast_frozen(model)
    data = requests(case)
    tokenizer = SimpleNamespace(pad_token_id=2)
    stamps: dict[str, list[float]] = {"entrap": [], "harden": []}

    def listen(event: Event) -> None:
        stamps[str(event["event"])].append(time.monotonic())

    draws, subject = Draws(config.seed), Subject(model, tokenizer, config)
    delta, _ = entrap(subject, data.harmful, 1.0, draws, listen)
    harden(subject, data, delta[None], 1e-4, draws, listen)
    seconds = {
        name: statistics.median(b - a for a, b in itertools.pairwise(times))
        for name, times in {"inner": stamps["entrap"], "outer": stamps["harden"]}.items()
    }
    counted = operations(case, SHAPES[case.shape], VOCABULARY, layer, config)
    return {**asdict(case), "layer": layer, "seconds": seconds, "operations": counted}


def requests(case: Case) -> DefenderSet:
    """Random token ids, all prompts alike in length, behind one system turn."""
    draw = torch.Generator().manual_seed(1)
    system = torch.randint(3, VOCABULARY, (SYSTEM,), generator=draw).tolist()

    def prompt() -> Prompt:
        ids = system + torch.randint(3, VOCABULARY, (case.prompt,), generator=draw).tolist()
        return Prompt(ids, SYSTEM, len(ids))

    def reply() -> list[int]:
        ids: list[int] = torch.randint(3, VOCABULARY, (case.reply,), generator=draw).tolist()
        return ids

    short = Config().entrap.response_tokens
    harmful = [Harmful(prompt(), reply(), reply()[:short], reply()[:short]) for _ in range(16)]
    return DefenderSet(harmful, [Benign(prompt(), reply(), False) for _ in range(16)], [], True, {})


def fit(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Least squares of the relative error of a + b * operations; how far off it is at worst."""
    count = np.array([row["operations"][kind] for row in rows])
    seconds = np.array([row["seconds"][kind] for row in rows])
    terms = np.stack([np.ones_like(count), count], 1)
    (a, b), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds), rcond=None)
    off = np.abs((a + b * count) / seconds - 1)
    return {"a": float(a), "b": float(b), "worst": float(off.max()), "median": float(np.median(off))}


def seven_billion(config: Config) -> dict[str, float]:
    """Seconds of a default round of a 7B Llama on one H100, without replies: 32 blocks of width 4096."""
    shape, vocabulary, layer = (4096, 11008, 32), 32000, 5 * 32 // 6
    block = 4 * 4096**2 + 3 * 4096 * 11008
    original = 2 * (config.requests + config.anchors) * (Case().prompt + Case().reply) * 32 * block
    entrap, short = config.entrap, Case(reply=config.entrap.response_tokens)
    once = entrap.batches * 2 * entrap.batch * (short.prompt + 2 * short.reply) * layer * block
    inner = operations(short, shape, vocabulary, layer, config)["inner"]
    outer = operations(Case(), shape, vocabulary, layer, config)["outer"]
    total = once + entrap.steps * inner + config.harden.steps * outer
    seconds = (original + config.rounds * total) / H100
    return {"operations": total, "seconds_a_round": total / H100, "seconds": seconds}


def main() -> None:
    keep_freed_memory()
    base = Case()
    cases = [replace(base, prompt=n) for n in (32, 64, 128, 256)]
    cases += [replace(base, reply=n) for n in (16, 32, 64)]
    cases += [replace(base, depth=share) for share in (0.3, 0.5, 0.7)]
    cases += [replace(base, shape=name) for name in SHAPES if name != base.shape]
    begun = RESULTS.with_suffix(".part.json")  # of a run that was interrupted
    rows: list[dict[str, Any]] = json.loads(begun.read_text()) if begun.exists() else []
    for case in cases[len(rows) :]:
        rows.append(measure(case))
        print(json.dumps(rows[-1]), flush=True)
        begun.write_text(json.dumps(rows))
    content = {
        "threads": torch.get_num_threads(),
        "rows": rows,
        "fit": {kind: fit(rows, kind) for kind in ("inner", "outer")},
        "seven_billion": seven_billion(Config()),
    }
    write(RESULTS, "python benchmarks/scaling.py", content)
    begun.unlink()
    print(json.dumps({name: content[name] for name in ("fit", "seven_billion")}, indent=1))


if __name__ == "__main__":
    main()
