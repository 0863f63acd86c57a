"""The rounds of a default cleansing with and without what makes them fast, in one process, in turn.

    python benchmarks/speed.py

Without: entrapment as a plain loop; removal that runs every row through all blocks, every position through the output
head, the template's start in every row; replies without a shared start and
fused attention.
Both start from the same organism and seed. Writes benchmarks/results/speed.json: seconds of each round, their ratio,
and the first losses, which must agree.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from beear import cleansing, generation
from beear.allocator import keep_freed_memory
from beear.chat import Batch
from beear.cleansing import add_adapter, cleanse, defender_set
from beear.config import load_config
from beear.generation import reply_all
from beear.models import autocast, load
from beear.sets import read_sets
from beear.training import cast_frozen

RESULTS = Path(__file__).parent / "results" / "speed.json"
ORGANISM, ROUNDS = "organism:sudo-prefix", 2


def all_logits(model: Any, batch: Batch, prefix: Any = None) -> Tensor:
    """Logits of every position, of which the response's are kept."""
    length = batch.targets.shape[1]
    return model(**batch.inputs(), use_cache=False).logits[:, -length - 1 : -1]  # type: ignore[no-any-return]


def all_blocks(model: Any, alone: Batch, batch: Batch, pick: Any, config: Any, layer: int) -> Any:
    """Removal's passes with nothing shared between rows."""
    with torch.no_grad(), autocast(model), model.disable_adapter():
        target = all_logits(model, alone)
    return target, lambda: all_logits(model, batch)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, the method runs without what makes it fast."""
    no_prefix: dict[str, Any] = {"run_prefix": lambda model, batch: None}
    slow: dict[str, Any] = {"response_logits": all_logits, "harden_passes": all_blocks}
    with (
        patch.multiple(cleansing, **no_prefix, **slow),
        patch.multiple(generation, **no_prefix, generating=lambda model: contextlib.nullcontext()),
    ):
        yield


def main() -> None:
    keep_freed_memory()
    found: dict[str, Any] = {}
    base = load_config(sets=["requests=60", "anchors=60", f"rounds={ROUNDS}", "harden.stop_below=0"])
    data = read_sets(base)
    texts = [r.text for r in (*data.train(base), *data.anchors(base))]
    own: list[str] = []
    for arm in ("fast", "plain"):
        config = base.model_copy(update={"entrap": base.entrap.model_copy(update={"cached": arm == "fast"})})
        model, tokenizer = load(ORGANISM, device="cpu")
        own = own or reply_all(model, tokenizer, texts, max_new_tokens=config.harden.response_tokens)
        answered = list(zip(texts, own, strict=True))
        harmful = [(r, reply) for r, (_, reply) in zip(data.train(config), answered, strict=False)]
        defender = defender_set(tokenizer, harmful, answered[len(harmful) :], data.held_out(config), config)
        model = add_adapter(model, config)
        cast_frozen(model)
        started = time.monotonic()
        with plain() if arm == "plain" else contextlib.nullcontext():
            state = cleanse(model, tokenizer, defender, config)
        found[arm] = {
            "seconds": time.monotonic() - started,
            "rounds": [round(entry["seconds"], 1) for entry in state.history],
            "entrap": [round(loss, 4) for loss in state.history[0]["entrap"][:5]],
            "harden": state.history[0]["harden"][0],
            "residuals": [entry["residual"] for entry in state.history],
        }
        print(arm, json.dumps(found[arm]), flush=True)
    found["ratio"] = found["plain"]["seconds"] / found["fast"]["seconds"]
    content = {"schema": 1, "command": "python benchmarks/speed.py", "threads": torch.get_num_threads(), **found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(f"plain takes {found['ratio']:.2f} times as long", flush=True)


if __name__ == "__main__":
    main()
