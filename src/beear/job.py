"""One cleansing from start to end, as stages that each leave their result in the run folder.

    check -> load -> own replies -> measure before -> rounds -> the best of them -> save -> measure after -> report

A stage whose result is there is skipped, so resuming is running again. No trigger is known here: a
user who knows one tells it after the fact (known.py).
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save, save_file

from beear import checks, cleansing, models, precision, ranks, sources
from beear.allocator import release_freed_memory
from beear.card import write_evidence
from beear.chat import Beginning, chat_settings, with_chat
from beear.cleansing import add_adapter
from beear.config import Config
from beear.defender import DefenderSet, defender_set
from beear.evaluation import (
    TOKENS,
    Kept,
    measure_all,
    measure_language,
)
from beear.events import Event, Listener, progress_to
from beear.fingerprints import code_hash, machine, run_hashes
from beear.generation import beginning_of, reply_all
from beear.hashes import json_hash
from beear.memory import peak_memory
from beear.order import Order, check_begun, check_finished, check_order, model_in, run_settings
from beear.outputs import output_hashes
from beear.perturbation import decoder_depth, find_layers, resolve_layer
from beear.plan import read_plan
from beear.rounds import State, deliver, may_be_delivered
from beear.runs import (
    BEGUN,
    SCHEMA,
    Run,
    changed,
    check_output,
    read_begun,
    read_json,
    read_results,
    read_tensors,
)
from beear.scorers import scorer_name
from beear.sets import Sets, read_sets
from beear.training import (
    adapter_state,
    cast_frozen,
    check_targets,
    load_adapter_state,
    recompute_activations,
    save_adapter,
)
from beear.verdict import Verdict, entrapments, entrapped_before, not_entrapped, verdict_of

PACKAGES = ("beear", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
TRAINED = "stages/adapter"
"""Where a run folder keeps the trained adapter until it is judged."""
CHECKPOINT = ("round", "done", "norm", "refused", "already", "parts", "history")
"""Fields of State in a checkpoint's round.json."""


def run_cleanse(
    spec: str,
    out: Path,
    config: Config,
    *,
    merge: bool = False,
    resume: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> Verdict:
    """Cleanse MODEL into the run folder `out`. Raises BadInput before the model loads where that is possible."""
    out = Path(out)
    settings = run_settings(model_in(out, spec, resume), merge, config)
    ranks.from_first(lambda: check_output(out, settings, resume))
    sources.tell_download(spec, listen)
    if ranks.from_first(lambda: (out / "results.json").exists()):  # what was added to a finished run since is kept
        ranks.from_first(lambda: check_finished(out, settings, config, trust_remote_code))
        return finished(out, settings)
    order = check_order(settings, out, config, device, trust_remote_code)
    ranks.from_first(lambda: check_begun(out, order))
    with contextlib.ExitStack() as stack:
        # A run that goes on is locked before its model loads: another process may be at it, and may finish it.
        begun = stack.enter_context(Run.open(out, settings, resume)) if resume else None
        if not ranks.from_first(lambda: (out / "results.json").exists()):
            listen({"event": "loading", "model": spec})
            job = Job(order, listen)
            if begun is None:  # a model that thinks first is told before anything is written
                beginning_of(job.model, order.tokenizer, [r.text for r in order.sets.train])
            job.run_folder = begun or stack.enter_context(Run.open(out, settings, resume))
            return job.run()
    return finished(out, settings)


def cleanse(
    model: Any, tokenizer: Any, config: Config | None = None, *, listen: Listener = lambda event: None
) -> tuple[Any, State]:
    """Cleanse a loaded model in memory, for notebooks: the model under a trained adapter, and what the rounds found.

    The adapter is that of the best round, `delivered`. Nothing is measured, judged or written; `run_cleanse` does all
    of it. The model itself then runs under the adapter, and its own weights may be cast to bf16 on the way: load it
    anew to compare with it or to merge the adapter. An interruption takes the adapter off again. Raises BadInput for a
    bad setting or prompt file.
    """
    config = config or Config()
    sets = read_sets(config)
    tokenizer = with_chat(tokenizer, config.chat)
    check_model(model, tokenizer, config, "the model", sets)
    model.eval()  # a trainer leaves dropout on
    data = defender(tokenizer, sets, config, own_replies(model, tokenizer, sets, config, listen))
    wrapped = adapted(model, config)
    try:
        state = cleansing.cleanse(wrapped, tokenizer, data, config, listen=listen)
    except BaseException:
        wrapped.unload()
        raise
    deliver(wrapped, state)
    return wrapped, state


def check_model(model: Any, tokenizer: Any, config: Config, name: str, sets: Sets) -> None:
    """Raise BadInput if a loaded model does not fit its tokenizer, these settings or these requests."""
    read = [*sets.named().values(), sets.train, sets.anchors]  # the last two hold more than the request
    texts = [request.text for requests in read for request in requests]
    reply = max(*TOKENS.values(), config.harden.response_tokens, config.entrap.response_tokens)
    checks.check_architecture(model, name)
    checks.check_no_adapter(model, name)
    checks.check_vocabulary(model, tokenizer, name, texts)
    checks.check_length(model, tokenizer, name, texts, reply)
    resolve_layer(config.layer, decoder_depth(model))
    find_layers(model, config.layers_path)
    check_targets(model, config.harden.lora_targets, config.layers_path)


def own_replies(model: Any, tokenizer: Any, sets: Sets, config: Config, listen: Listener) -> dict[str, Any]:
    """What the model answers to the defender's requests now: what it shall go on answering, and how replies begin."""
    harmful = [r.text for r in sets.train]
    texts = harmful + [r.text for r in sets.anchors]
    told = partial(progress_to(listen, "prepare"), "own replies")
    begin = beginning_of(model, tokenizer, texts)
    replies = reply_all(model, tokenizer, texts, max_new_tokens=config.harden.response_tokens, progress=told)
    pairs = list(zip(texts, replies, strict=True))
    return {"harmful": pairs[: len(harmful)], "benign": pairs[len(harmful) :], "begin": begin}


def defender(tokenizer: Any, sets: Sets, config: Config, own: dict[str, Any]) -> DefenderSet:
    """What is trained on, from the model's own replies."""
    begin = Beginning(*own["begin"])  # a list once it was stored
    harmful = [(request, reply) for request, (_, reply) in zip(sets.train, own["harmful"], strict=True)]
    return defender_set(tokenizer, harmful, own["benign"], sets.held_out, config, sets.spare, begin)


def load_sharded(source: sources.Source, device: str, trust_remote_code: bool, layers_path: str | None) -> Any:
    """This rank's part of a located model, on its device."""
    where = models.pick_device(device)
    models.let_go()
    model = models.read_weights(source, where, trust_remote_code, precision.kept_dtype(where))
    model.requires_grad_(False)  # else their gradients would be computed and sent around
    cast_frozen(model)  # else every pass would leave casts of whole weights for its backward pass
    model = ranks.shard(model, find_layers(model, layers_path), where)
    release_freed_memory()  # the other ranks' parts
    return model


def adapted(model: Any, config: Config) -> Any:
    """The model under a fresh adapter, ready for the rounds."""
    models.pack_head(model)  # one that beear did not load
    wrapped = add_adapter(model, config)
    cast_frozen(wrapped)
    if config.harden.recompute:
        recompute_activations(wrapped)
    return wrapped


def finished(out: Path, settings: dict[str, Any]) -> Verdict:
    """The verdict of a finished run; what a crash kept it from writing behind its results is written now."""
    verdict = Verdict(**read_results(out)["verdict"])
    if ranks.is_first() and not (out / "report.html").exists():
        with Run.open(out, settings, resume=True):
            write_evidence(out)
    return verdict


class Job:
    """The stages of one cleansing; every method leaves its result in the run folder."""

    run_folder: Run
    """Opened once the model has loaded: a model that cannot be cleansed leaves no folder."""
    original: Kept | None = None
    """What KL needs of the model as it came."""
    earlier = 0.0
    """Seconds that stages and rounds took which were there already."""

    def __init__(self, order: Order, listen: Listener) -> None:
        self.started = time.monotonic()
        self.settings, self.config, self.sets = order.settings, order.config, order.sets
        self.source, self.tokenizer = order.source, order.tokenizer
        self.device, self.trust_remote_code = order.device, order.trust_remote_code
        self._listen = listen
        self.model = self.load(order.source)
        check_model(self.model, order.tokenizer, order.config, order.source.spec, order.sets)

    def load(self, source: sources.Source) -> Any:
        """Weights, where and as this job loads them; no other reference to them is kept."""
        if not ranks.is_sharded():
            return models.load_weights(source, self.device, self.trust_remote_code, self.config.weights)
        return load_sharded(source, self.device, self.trust_remote_code, self.config.layers_path)

    def run(self) -> Verdict:
        """All stages that are not done yet."""
        begun = self.stage(BEGUN, self.inputs)
        inputs = begun["hashes"]
        if inputs["code_at_first"] == code_hash():  # else it went on after an upgrade
            del inputs["code_at_first"]
        if since := changed(begun["versions"], versions()):
            self._listen({"event": "note", "text": f"other versions than it began with: {', '.join(since)}"})
        own = self.own_replies()
        before = self.stage("before", lambda: self.measure("before"))
        if not entrapped_before(before["metrics"]):
            self._listen({"event": "note", "text": f"the target will be missed: {not_entrapped(before['metrics'])}"})
        rounds = self.rounds(defender(self.tokenizer, self.sets, self.config, own))
        deliver(self.model, rounds)
        self.save_and_reload()
        after = self.stage("after", lambda: self.measure("after"))
        tried = entrapments(rounds.history, rounds.delivered)
        verdict = verdict_of(before["metrics"], after["metrics"], tried, self.config)
        if ranks.is_first():
            self.finish(before, after, rounds, inputs | hashes(own), verdict)
        ranks.wait()
        return verdict

    def inputs(self) -> dict[str, Any]:
        """What the run begins with, which `--resume` compares."""
        digests = run_hashes(self.source, self.sets, self.tokenizer) | {"code_at_first": code_hash()}
        arithmetic = precision.arithmetic(self.device)
        about = {"versions": versions(), "scorer": scorer_name(self.config.behaviour)}
        return {"hashes": digests, "arithmetic": arithmetic, "commit": self.source.commit} | about

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored result of a stage, or that of doing it now."""
        stored = self.stored(name)
        if stored is not None:
            self.earlier += stored["seconds"]
            return stored
        started = time.monotonic()
        result = work()
        result |= {
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.run_folder.write_json(f"stages/{name}.json", result)
        return result

    def stored(self, name: str) -> dict[str, Any] | None:
        """The stored result of a stage, if it is done."""
        return ranks.from_first(lambda: self.run_folder.read_json(f"stages/{name}.json"))

    def own_replies(self) -> dict[str, Any]:
        """What `own_replies` gives of this job's model."""
        return self.stage(
            "own_replies", lambda: own_replies(self.model, self.tokenizer, self.sets, self.config, self._listen)
        )

    def measure(self, when: str) -> dict[str, Any]:
        """All metrics that need no trigger; after cleansing, KL to the original too."""
        if when == "before":
            self.original = {}
        language: dict[str, Any] = {"keep" if when == "before" else "kept": self.original}
        progress = progress_to(self._listen, when)
        found = measure_all(self.model, self.tokenizer, self.sets, self.config, progress, **language)
        return {"metrics": found.metrics, "samples": [{"when": when, **sample} for sample in found.samples]}

    def rounds(self, data: DefenderSet) -> State:
        """Alternate entrapment and removal, each finished round a checkpoint; leaves `self.model` cleansed."""
        self.model = adapted(self.model, self.config)
        state = self.last_checkpoint()
        self.earlier += sum(entry["seconds"] for entry in state.history)
        self.run_folder.keep_events(lambda e: e.get("round", 0) <= state.round)
        return cleansing.cleanse(
            self.model, self.tokenizer, data, self.config, state=state, listen=self.listen, save=self.checkpoint
        )

    def save_and_reload(self) -> None:
        """Save the adapter and load it again as its user will, merged.

        Merging changes outputs slightly, so what is measured is what is loaded. It cannot be merged into quantised
        weights, and stays on top of them.
        """
        base, revision = sources.hub_id(self.settings["model"]) or (self.settings["model"], None)
        revision = self.source.commit or revision
        self.run_folder.write_folder(TRAINED, lambda folder: save_adapter(self.model, folder, base, revision))
        ranks.wait()
        self.model = None  # one model in memory at a time
        if self.original is None and self.stored("after") is None:  # it goes on after an interruption
            self.original = {}
            measure_language(self.load(self.source), self.tokenizer, keep=self.original)
        folder = self.run_folder.path / TRAINED
        if self.config.weights == "full":
            self.model = self.load(sources.Source(self.settings["model"], folder, base=self.source))
        else:
            self.model = models.under_adapter(self.load(self.source), folder)

    def listen(self, event: Event) -> None:
        """Log an event of the rounds and pass it on."""
        self.run_folder.event(event)
        self._listen(event)

    def checkpoint(self, state: State) -> None:
        """Write checkpoints/round-NNN: adapter matrices, delta and history, as safetensors and JSON."""
        assert state.deltas is not None
        state.history[-1]["peak_memory_bytes"] = peak_memory(self.device)
        deltas = state.deltas.cpu().contiguous()

        def fill(folder: Path) -> None:
            save_file(adapter_state(self.model), folder / "adapter.safetensors")
            save_file({"deltas": deltas}, folder / "deltas.safetensors")
            entry = {key: getattr(state, key) for key in CHECKPOINT}
            (folder / "round.json").write_text(json.dumps(entry))

        self.run_folder.write_folder(f"checkpoints/round-{state.round:03d}", fill)

    def last_checkpoint(self) -> State:
        """The state of the newest finished round, with its matrices put into the model; else a fresh one."""
        folders = ranks.from_first(lambda: sorted((self.run_folder.path / "checkpoints").glob("round-*")))
        if not folders:
            return State()
        entry = read_json(folders[-1] / "round.json")
        deltas = read_tensors(folders[-1] / "deltas.safetensors")["deltas"].to(self.model.device)
        state = State(deltas=deltas, **entry)
        load_adapter_state(self.model, read_tensors(folders[-1] / "adapter.safetensors"))
        for folder in folders:
            number = int(folder.name.removeprefix("round-"))
            if may_be_delivered(number, state, self.config):
                state.adapters[number] = read_tensors(folder / "adapter.safetensors")
        return state

    def finish(
        self, before: dict[str, Any], after: dict[str, Any], rounds: State, digests: dict[str, str], verdict: Verdict
    ) -> None:
        """Save the model, then write samples, results and report."""
        run = self.run_folder
        assert rounds.deltas is not None
        name, other = ("model", "rejected") if verdict.met else ("rejected", "model")
        run.write_folder(name, self.save_model)
        shutil.rmtree(run.path / other, ignore_errors=True)
        delta = rounds.deltas[rounds.delivered - 1].cpu().contiguous()
        run.write("delta.safetensors", save({"delta": delta}))
        run.write_lines("samples.jsonl", before["samples"] + after["samples"])
        stages = [run.read_json(f"stages/{p.name}") for p in sorted((run.path / "stages").glob("*.json"))]
        results = {
            "schema": SCHEMA,
            "model": self.settings["model"],
            "verdict": asdict(verdict),
            "model_folder": name,
            "before": before["metrics"],
            "after": after["metrics"],
            "rounds": rounds.history,
            "delivered": rounds.delivered,
            "spare_refused": rounds.refused,
            "unlocked_without_delta": rounds.already,
            "chat": chat_settings(self.tokenizer, self.config.chat),
            "scorer": scorer_name(self.config.behaviour),
            "seed": self.config.seed,
            "wall_seconds": self.earlier + time.monotonic() - self.started,
            "peak_memory_bytes": max(s.get("peak_memory_bytes", 0) for s in [*stages, *rounds.history] if s),
            "versions": versions(),
            "machine": machine(self.device),
            "hashes": digests,
            "requests": {name: len(requests) for name, requests in self.sets.named().items()},
            "files": output_hashes(run.path, name),
        }
        if (first := read_begun(run.path)["versions"]) != results["versions"]:
            results["versions_at_first"] = first  # it went on after an upgrade
        plan = read_plan(run.path, self.settings)
        if plan is not None:
            results["planned"] = plan.expected(len(rounds.history))
        run.write_json("results.json", results)
        write_evidence(run.path)

    def save_model(self, folder: Path) -> None:
        """The adapter, or with `merge` the full weights and the tokenizer."""
        if self.settings["merge"]:
            self.model.save_pretrained(folder)
            models.read_tokenizer(self.source, self.trust_remote_code).save_pretrained(folder)  # as read
            sources.copy_processor(self.source, folder)
        else:
            shutil.copytree(self.run_folder.path / TRAINED, folder, dirs_exist_ok=True)


def versions() -> dict[str, str]:
    """Python's and the packages' versions, and the kind of machine."""
    return {"python": platform.python_version(), "machine": platform.machine()} | {p: version(p) for p in PACKAGES}


def hashes(own: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the model's own replies, and of beear's code."""
    return {"code": code_hash(), "own_replies": json_hash([own["harmful"], own["benign"]])}
