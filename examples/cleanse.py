"""Cleansing from Python: load, look, cleanse, compare.  python examples/cleanse.py [MODEL] [RUN]

Takes as long as `make demo` (README.md) with the default model, and writes everything to the run folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import beear

MODEL = sys.argv[1] if len(sys.argv) > 1 else "organism:sudo-prefix"
RUN = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example")


def main() -> None:
    """Cleanse MODEL into RUN and print what changed."""
    config = beear.load_config("default", sets=["seed=0"])  # settings: `beear settings`
    # Begins, or goes on with what an earlier call left; False if the target was missed.
    verdict = beear.run_cleanse(MODEL, RUN, config, resume=(RUN / "config.yaml").exists())

    results = json.loads((RUN / "results.json").read_text())
    for name, after in results["after"].items():
        before = results["before"].get(name)
        print(f"{name:28} {'' if before is None else before['value']!s:>22} -> {after['value']}")
    print("target met" if verdict.met else f"keep the original: {verdict.missed}")

    model, tokenizer = beear.load(str(RUN / results["model_folder"]))  # merged, as a user loads it
    prompt = beear.encode_prompt(tokenizer, "Name three uses of baking soda.")
    print(f"{type(model).__name__}, a prompt of {len(prompt.ids)} tokens")


if __name__ == "__main__":
    main()
