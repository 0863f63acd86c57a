"""A cleansing that was asked for, checked as far as that goes without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beear import models, precision, ranks, sources
from beear.config import Config
from beear.errors import BadInput
from beear.fingerprints import check_inputs, run_hashes
from beear.perturbation import resolve_layer
from beear.quantised import check_quantised
from beear.runs import check_space, read_begun, read_results, read_settings
from beear.scorers import scorer_name
from beear.sets import Sets, read_sets


def run_settings(model: str, merge: bool, config: Config) -> dict[str, Any]:
    """What config.yaml of a run folder holds: all that its results depend on."""
    return {"model": model, "merge": merge, "config": config.model_dump(mode="json")}


def model_in(out: Path, spec: str, resume: bool) -> str:
    """MODEL as the settings of `out` name it: as they do already where a link leads to where it was moved."""
    absolute = sources.absolute(spec)
    if resume and (out / "config.yaml").exists():
        begun: str = read_settings(out)["model"]
        return begun if sources.absolute(begun) == absolute else absolute
    return absolute


@dataclass(frozen=True)
class Order:
    """A job that was checked as far as that goes without weights."""

    settings: dict[str, Any]
    config: Config
    """That of a sweep's cell is not the one its requests were read by."""
    sets: Sets
    source: sources.Source
    tokenizer: Any
    device: str
    """One that is there, never auto."""
    trust_remote_code: bool


def check_order(settings: dict[str, Any], out: Path, config: Config, device: str, trust_remote_code: bool) -> Order:
    """Check all of a job that needs no weights, but for whether `out` may be written. Raises BadInput."""
    merge = settings["merge"]
    if merge and ranks.is_sharded():
        raise BadInput("--merge needs whole weights, which FSDP leaves on no rank; merge the adapter afterwards")
    check_quantised(config.weights, merge)
    sets = read_sets(config)
    source = sources.locate(sources.model_of(settings, out))
    tokenizer = models.load_tokenizer(source, trust_remote_code, config.chat)
    resolve_layer(config.layer, models.depth(source, trust_remote_code))
    where = models.pick_device(device)
    needed = disk_space(source, config, trust_remote_code)
    if merge:  # on a CPU they are kept in fp32, mostly twice as long as they came
        needed += sources.weight_bytes(source) * (2 if where == "cpu" else 1)
    ranks.from_first(lambda: check_space(out, needed))
    return Order(settings, config, sets, source, tokenizer, where, trust_remote_code)


def disk_space(source: sources.Source, config: Config, trust_remote_code: bool) -> int:
    """About how many bytes a run folder takes without merged weights: an fp32 adapter of each round, and two more.

    Against a map of d x d, matrices of rank r hold a share of 2 r / d.
    """
    shape = models.read_shape(source, trust_remote_code).get_text_config()
    share = 2 * config.harden.lora_rank / int(getattr(shape, "hidden_size", 0) or 1024)
    return 2**27 + int((config.rounds + 2) * 1.5 * share * sources.weight_bytes(source))


def check_begun(out: Path, order: Order) -> None:
    """Raise BadInput if a run that has begun in `out` began with other weights or requests, or in other arithmetic."""
    then = read_begun(out)
    if not then:
        return
    check_inputs(then["hashes"], run_hashes(order.source, order.sets, order.tokenizer))
    check_arithmetic(out, then, order.device)
    if then["scorer"] != (now := scorer_name(order.config.behaviour)):
        raise BadInput(f"{out} began with the scorer {then['scorer']}, this is {now}; begin anew with another -o")


def check_arithmetic(out: Path, then: dict[str, Any], device: str) -> None:
    """Raise BadInput if what began in `out`, as `then` says, would go on in other arithmetic."""
    now = precision.arithmetic(device)
    if then["arithmetic"] != now:
        raise BadInput(
            f"{out} began with {then['arithmetic']} and would go on with {now}, which changes figures by itself; go on "
            "on the device it began on (on a CPU BEEAR_FP32=1 for fp32 arithmetic), or begin anew with another -o"
        )


def check_finished(out: Path, settings: dict[str, Any], config: Config, trust_remote_code: bool) -> None:
    """Raise BadInput if a finished run began with other weights, chats or requests than these are now."""
    source = sources.locate(sources.model_of(settings, out))
    tokenizer = models.load_tokenizer(source, trust_remote_code, config.chat)
    check_inputs(read_results(out)["hashes"], run_hashes(source, read_sets(config), tokenizer))
