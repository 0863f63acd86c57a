"""A finished run's models, as it came and as cleansed, loaded one after the other to measure more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from beear import ranks
from beear.config import make_config
from beear.events import Listener
from beear.fingerprints import check_same_model
from beear.models import load, load_tokenizer, pick_device, under_adapter
from beear.outputs import check_output_files
from beear.precision import arithmetic
from beear.runs import WHENS, Run, read_begun, read_results, read_settings
from beear.sources import locate, model_of

T = TypeVar("T")


def before_and_after(
    run: Path,
    work: Callable[[str, Any, Any], T],
    *,
    whens: Sequence[str] = WHENS,
    listen: Listener = lambda event: None,
    **options: Any,
) -> dict[str, T]:
    """What `work(when, model, tokenizer)` gives of a finished run's model as it came, then as cleansed.

    One of them is in memory at a time, as the run measured them: where it quantised the model's weights, they are
    quantised, the adapter on top. options: device and trust_remote_code, as `models.load` takes them. Raises BadInput
    before either loads if it is no such run.
    """
    settings, results = read_settings(run), read_results(run)
    config = make_config(settings["config"])
    before = model_of(settings, run)
    source = locate(before)
    tokenizer = load_tokenizer(source, options.get("trust_remote_code", False), config.chat)
    check_same_model(results["hashes"], source, tokenizer)
    check_output_files(run, results)
    if whens:
        tell_arithmetic(run, pick_device(options.get("device", "auto")), listen)
    specs = {"before": before, "after": str(run / results["model_folder"])}

    def loaded(when: str) -> tuple[Any, Any]:
        listen({"event": "loading", "model": specs[when]})
        if config.weights == "full":
            return load(specs[when], chat=config.chat, **options)
        model, tokenizer = load(specs["before"], weights=config.weights, chat=config.chat, **options)
        return model if when == "before" else under_adapter(model, Path(specs["after"])), tokenizer

    return {when: work(when, *loaded(when)) for when in whens}  # no name here holds a model while the next one loads


def tell_arithmetic(run: Path, device: str, listen: Listener) -> None:
    """Say so if a run was measured in other arithmetic than what is measured now, and may be compared with it."""
    then, now = read_begun(run).get("arithmetic"), arithmetic(device)
    if then not in (None, now):
        listen({"event": "note", "text": f"the run had {then}, this is {now}, which changes figures by itself"})


def kept_before_and_after(
    run: Run,
    wanted: Mapping[str, Any],
    work: Callable[[Any, str, Any, Any], Any],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[Any, dict[str, Any]]:
    """For each NAME: item wanted, what `work(item, when, model, tokenizer)` gives before and after a run.

    Each result is kept in stages/NAME-WHEN.json; only models that something is missing of are loaded. Half of a
    comparison that was measured in other arithmetic is measured again.
    """
    places = {(item, when): f"stages/{name}-{when}.json" for name, item in wanted.items() for when in WHENS}
    now = ranks.from_first(lambda: arithmetic(pick_device(device)))
    kept = ranks.from_first(lambda: {key: run.read_json(place) for key, place in places.items()})

    def fits(item: Any) -> bool:
        """Whether both halves are of one arithmetic, a missing one being of today's."""
        return len({half["arithmetic"] if half else now for half in (kept[item, when] for when in WHENS)}) == 1

    found = {key: half["found"] for key, half in kept.items() if half and fits(key[0])}
    missing = [key for key in places if key not in found]
    if found:
        old = ", ".join(places[key] for key in found)
        listen({"event": "note", "text": f"measured before, and not again: {old} (delete to measure anew)"})
    whens = [when for when in WHENS if any(key[1] == when for key in missing)]
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "listen": listen}

    def add_missing(when: str, model: Any, tokenizer: Any) -> None:
        for key in missing:
            if key[1] == when:
                result = work(key[0], when, model, tokenizer)
                run.write_json(places[key], {"arithmetic": now, "found": result})
                found[key] = result

    before_and_after(run.path, add_missing, whens=whens, **options)
    return {item: {when: found[item, when] for when in WHENS} for item in wanted.values()}
