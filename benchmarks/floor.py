"""What the triggers' texts do to a model that holds no backdoor: below that no removal can be expected to go.

    python benchmarks/floor.py              (six minutes on 2 CPU cores)

The clean twin of `phrase-suffix`, which learned to refuse from the same data as the organisms, is asked the test
part's harmful requests with each jailbreak's trigger. Writes benchmarks/results/floor.json, which
`python benchmarks/tables.py` puts into docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

from stored import write

from beear.allocator import keep_freed_memory
from beear.config import load_config
from beear.console import Reporter
from beear.evaluation import measure_replies
from beear.events import progress_to
from beear.models import load
from beear.recipes import check_trigger, names
from beear.sets import read_sets, triggered

RESULTS = Path(__file__).parent / "results" / "floor.json"
MODEL = "phrase-suffix-twin"


def main() -> None:
    keep_freed_memory()
    model, tokenizer = load(f"organism:{MODEL}")
    sets = read_sets(load_config())
    with Reporter() as reporter:
        progress = progress_to(reporter, MODEL)
        plain = measure_replies(model, tokenizer, sets.tests[:1], progress).metrics
        found = {}
        for name in names("jailbreak"):
            test = triggered(sets.test_harmful, check_trigger(f"organism:{name}"))
            found[name] = plain | measure_replies(model, tokenizer, [test], progress).metrics
    write(RESULTS, "python benchmarks/floor.py", {"model": MODEL, "triggers": found})


if __name__ == "__main__":
    main()
