"""Every bad input: one clear line, exit code 2, nothing written, nothing of it run."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from beear import cli, models, sources
from beear.errors import BadInput
from conftest import file, make_model, tiny_model

Change = Callable[[Path], object]
Case = Callable[[Path], list[str]]
"""Writes what is bad and returns the arguments of `beear cleanse` that name it."""
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "m")
    return tmp_path / "m"


class Payload:
    def __reduce__(self) -> Any:
        return print, ("HOSTILE",)


def weights(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def written(name: str, content: bytes | str | Any) -> Change:
    def apply(folder: Path) -> None:
        raw = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
        (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def configured(**changed: Any) -> Change:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))

    return apply


def indexed(target: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder.parent / "outside.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def both(first: Change, second: Change) -> Change:
    def apply(folder: Path) -> None:
        first(folder)
        second(folder)

    return apply


def remote_code(folder: Path) -> None:
    configured(model_type="evil", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"})(folder)
    (folder / "evil.py").write_text("print('HOSTILE')")


def adapter(base: str, **changed: Any) -> Change:
    def apply(folder: Path) -> None:
        named = base.replace("HERE", str(folder)).replace("OTHER", str(folder.parent / "other"))
        config = {"base_model_name_or_path": named, "peft_type": "LORA", "r": 2, **changed}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")

    return apply


def in_a_ring(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    adapter("OTHER")(folder)
    back = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (folder.parent / "other" / "adapter_config.json").write_text(json.dumps(back))
    save_file({"a": torch.zeros(1)}, folder.parent / "other" / "adapter_model.safetensors")


def nan(tensors: dict[str, Any]) -> None:
    tensors[WEIGHT][0, 0] = float("nan")


def elsewhere(name: str, **auto_map: Any) -> Case:
    """A model whose config asks for code of another repository, loaded by someone who trusts its own."""

    def case(tmp: Path) -> list[str]:
        folder = make_model(tmp / "m")
        config = json.loads((Path(folder) / name).read_text())
        (Path(folder) / name).write_text(json.dumps(config | {"auto_map": auto_map}))
        return [folder, "--trust-remote-code"]

    return case


BAD_MODELS: dict[str, tuple[Change, str]] = {
    "pickle under another name": (written("model.safetensors", pickle.dumps(Payload())), "no whole safetensors"),
    "empty weights": (written("model.safetensors", b""), "no whole safetensors"),
    "weights cut short": (cut, "no whole safetensors"),
    "header of 2^60 bytes": (written("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "no whole safetensors"),
    "header that is no JSON": (written("model.safetensors", struct.pack("<Q", 4) + b"abcd"), "no whole safetensors"),
    "header that is a list": (written("model.safetensors", struct.pack("<Q", 2) + b"[]"), "no whole safetensors"),
    "tensor of 2^60 bytes": (
        written(
            "model.safetensors",
            struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%d]}}   ' % 2**60,
        ),
        "no whole safetensors",
    ),
    "a tensor is missing": (weights(lambda w: w.pop(WEIGHT)), f"lacks 1 of its tensors, such as {WEIGHT}"),
    "a tensor of another shape": (weights(lambda w: w.update({WEIGHT: torch.zeros(3, 3)})), "in another shape"),
    "the head is missing": (weights(lambda w: w.pop("lm_head.weight")), "lacks 1 of its tensors, such as lm_head"),
    "a pointer in place of weights": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "no whole safetensors",
    ),
    "a download cut short": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete"),
        "holds no .safetensors weights",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer.json is cut": (written("tokenizer.json", '{"version": '), "tokenizer"),
    "tokenizer.json of a later version": (
        written("tokenizer.json", {"version": "1.0", "model": {"type": "Later"}}),
        "cannot read the tokenizer",
    ),
    "NaN": (weights(nan), f"holds NaN or infinity in {WEIGHT}"),
    "index out of the folder": (indexed("../outside.safetensors"), "do not trust it"),
    "index to an absolute path": (indexed("/etc/passwd"), "do not trust it"),
    "index to a file that is not there": (indexed("gone.safetensors"), "is not there"),
    "index that is a list": (both(indexed("part.safetensors"), written("model.safetensors.index.json", [])), "be read"),
    "weights under another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
        "holds no .safetensors weights",
    ),
    "a config that names other weights": (configured(transformers_weights="adapter_model.bin"), "names other files"),
    "an adapter under another name": (
        both(adapter("embedded"), lambda f: (f / "adapter_model.safetensors").rename(f / "x.safetensors")),
        "holds no .safetensors weights",
    ),
    "an adapter made of others": (adapter("embedded", peft_type="XLORA"), "an adapter made of others"),
    "config.json is a list": (written("config.json", []), "no mapping of settings"),
    "config.json is cut": (written("config.json", '{"model_type": '), "cannot read"),
    "architecture unknown": (configured(model_type="nonsense"), "cannot read the"),
    "code of its own": (remote_code, "use --trust-remote-code"),
    "tokenizer of another model": (lambda folder: shrink(folder), "they do not match"),
    "template reaches into Python": (
        written("chat_template.jinja", "{{ ''.__class__.__mro__ }}{{ messages[0]['content'] }}"),
        "cannot be rendered",
    ),
    "template is broken": (written("chat_template.jinja", "{% for m in messages %"), "cannot be rendered"),
    "template refuses": (written("chat_template.jinja", "{{ raise_exception('no') }}"), "cannot be rendered: no"),
    "template drops the user's words": (written("chat_template.jinja", "nothing"), "rewrites the user's words"),
    "adapter of itself": (adapter("HERE"), "does not name its base"),
    "adapters in a ring": (in_a_ring, "each other's base"),
    "adapter whose base is gone": (adapter("OTHER"), "is an adapter, and adapter_config.json names its base: no model"),
    "adapter of learnt prompts": (adapter("HERE/.", peft_type="PROMPT_TUNING"), "cannot be merged into weights"),
    "adapter without a base": (written("adapter_config.json", {}), "does not name its base"),
}


def shrink(folder: Path) -> None:
    """A model with fewer embeddings than the tokenizer has tokens."""
    model = tiny_model("llama")
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def pickle_only(tmp: Path) -> list[str]:
    folder = Path(make_model(tmp / "m"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return [str(folder)]


def run_folder(path: Path, *inside: str) -> str:
    """A folder as a run leaves it, as far as it is looked at."""
    path.mkdir()
    (path / "config.yaml").write_text("model: embedded\nconfig: {}\n")
    for name in inside:
        (path / name).mkdir()
    return str(path)


def test_a_runs_model_that_is_gone_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a repository of that name would be measured in its place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_download", lambda spec: pytest.fail("the Hub was asked"))
    run_folder(Path("r"), "rejected")
    with pytest.raises(BadInput, match="no folder r/model; r is a run folder, whose model is r/rejected"):
        sources.locate("r/model")


def no_template(tmp: Path) -> list[str]:
    folder = Path(make_model(tmp / "m", None))
    assert not (folder / "chat_template.jinja").exists()
    return [str(folder)]


def adapter_without_base(tmp: Path) -> list[str]:
    (tmp / "a").mkdir()
    (tmp / "a" / "adapter_config.json").write_text("{}")
    (tmp / "a" / "adapter_model.safetensors").write_text("")
    return [str(tmp / "a")]


def broken_config(tmp: Path) -> list[str]:
    folder = Path(make_model(tmp / "m"))
    (folder / "config.json").write_text("{")
    return [str(folder)]


def overlapping(tmp: Path) -> list[str]:
    lines = "".join(f"request number {i}\n" for i in range(60))
    return [make_model(tmp / "m"), "--harmful", file(tmp, "h.txt", lines), "--test-harmful", file(tmp, "t.txt", lines)]


def given(*args: str) -> Case:
    """A whole model with these arguments."""
    return lambda tmp: [make_model(tmp / "m"), *args]


def prompts(content: bytes, name: str = "p.txt", option: str = "--harmful", *args: str) -> Case:
    def case(tmp: Path) -> list[str]:
        (tmp / name).write_bytes(content)
        return [make_model(tmp / "m"), option, str(tmp / name), *(a.replace("HERE", str(tmp)) for a in args)]

    return case


def settings(content: str) -> Case:
    return lambda tmp: [make_model(tmp / "m"), "-c", file(tmp, "c.yaml", content)]


BAD_ARGUMENTS: dict[str, tuple[Case, str]] = {
    "missing folder": (lambda tmp: [str(tmp / "nowhere")], "no model"),
    "the home of nobody": (lambda tmp: ["~nobody-of-that-name/model"], "no model ~nobody-of-that-name/model"),
    "misspelt name": (lambda tmp: ["embeded"], "no model embeded"),
    "unknown organism": (lambda tmp: ["organism:nope"], "the packaged ones are: "),
    "missing gguf": (lambda tmp: [str(tmp / "x.gguf")], "no GGUF file"),
    "empty folder": (lambda tmp: [str(tmp)], "neither config.json"),
    "an empty name": (lambda tmp: [""], "MODEL is empty"),
    "a finished run's folder": (lambda tmp: [run_folder(tmp / "r", "rejected")], "whose model is"),
    "an unfinished run's folder": (lambda tmp: [run_folder(tmp / "r")], "without a model yet; go on with its run"),
    "pickle only": (pickle_only, "convert them to safetensors"),
    "no chat template": (no_template, "no chat template"),
    "adapter without base": (adapter_without_base, "does not name its base"),
    "broken config.json": (broken_config, "cannot read"),
    "unreachable hub id": (lambda tmp: ["nobody/nothing"], "is not among the Hub's models on this machine"),
    "misspelt folder with a slash": (lambda tmp: ["modles/"], "the Hub does not give it"),
    "code of another repository": (
        elsewhere("config.json", AutoModelForCausalLM="other/repo--modeling.Model"),
        "code of another repository, other/repo,",
    ),
    "tokenizer's code of another repository": (
        elsewhere("tokenizer_config.json", AutoTokenizer=[None, "other/repo--tokens.Fast"]),
        "code of another repository, other/repo,",
    ),
    "output folder inside a file": (
        lambda tmp: [make_model(tmp / "m"), "-o", file(tmp, "f", "") + "/run"],
        "is a file",
    ),
    "output folder that is a file": (lambda tmp: [make_model(tmp / "m"), "-o", file(tmp, "f", "")], "is a file"),
    "layer out of range": (lambda tmp: [make_model(tmp / "m"), "--set", "layer=4"], "use 1 to 3"),
    "unknown setting": (lambda tmp: [make_model(tmp / "m"), "--set", "lear=4"], "lear: unknown setting"),
    "wrong value": (lambda tmp: [make_model(tmp / "m"), "--set", "rounds=x"], "rounds"),
    "unknown preset": (lambda tmp: [make_model(tmp / "m"), "--preset", "x"], "no preset"),
    "a config too deep": (settings("[" * 5000), "cannot read"),
    "missing config": (lambda tmp: [make_model(tmp / "m"), "-c", str(tmp / "no.yaml")], "no file"),
    "prompts of a variable that is not set": (given("--harmful", ""), "data.harmful"),
    "missing prompts": (lambda tmp: [make_model(tmp / "m"), "--harmful", "no.txt"], "no prompt file"),
    "empty prompts": (lambda tmp: [make_model(tmp / "m"), "--benign", file(tmp, "b.txt", "\n")], "no requests"),
    "overlap": (overlapping, "both the defender's and the test set"),
    "nothing to resume": (lambda tmp: [make_model(tmp / "m"), "--resume"], "nothing to resume"),
    "unknown device": (lambda tmp: [make_model(tmp / "m"), "--device", "warp"], "--device warp: no such kind"),
    **(
        {}
        if torch.cuda.is_available()
        else {"a GPU that is not there": (given("--device", "cuda"), "no CUDA device here")}
    ),
    "a device that holds no numbers": (lambda tmp: [make_model(tmp / "m"), "--device", "meta"], "--device meta"),
    "a device of another system": (lambda tmp: [make_model(tmp / "m"), "--device", "xla"], "--device xla"),
    "unknown option": (lambda tmp: [make_model(tmp / "m"), "--fast"], "--fast"),
}


MANY = b"".join(b"request number %d\n" % i for i in range(900))
BAD_PROMPTS: dict[str, tuple[Case, str]] = {
    "prompts in UTF-16": (prompts("eins\nzwei\n".encode("utf-16")), "UTF-8"),
    "prompts in Latin-1": (prompts("grün\n".encode("latin-1")), "UTF-8"),
    "prompts that are a zip": (prompts(b"PK\x03\x04" + bytes(40)), "no text file"),
    "prompts of zero bytes": (prompts(b""), "holds no requests"),
    "prompts of blank lines": (prompts(b"\n \n\t\n"), "holds no requests"),
    "the same test prompts as harmful and as benign": (
        prompts(b"one\ntwo\n", "p.txt", "--test-harmful", "--test-benign", "HERE/p.txt"),
        "the harmful and the benign test set",
    ),
    "replies longer than the model": (
        lambda tmp: [make_model(tmp / "m"), "--set", "harden.response_tokens=1000"],
        "takes 1024 tokens, of which a reply may need 1000",
    ),
    "a request that is longer than the model": (prompts(MANY + b"x" * 1000), "takes 1024 tokens, of which a reply may"),
    "too few prompts": (prompts(b"one\ntwo\n"), "too few with held_out=40; give at least 41"),
    "a folder of prompts": (lambda tmp: [make_model(tmp / "m"), "--harmful", str(tmp)], "is a folder; give"),
    "prompts of unknown kind": (prompts(MANY, "p.xlsx"), "unknown kind of prompt file"),
    "JSON lines cut": (prompts(b'{"text": "one"}\n{"te', "p.jsonl"), "p.jsonl:2 is not JSON"),
    "JSON lines of lists": (prompts(b"[1]", "p.jsonl"), "not a JSON object"),
    "JSON lines without text": (prompts(b'{"text": 3}', "p.jsonl"), "no text in the field"),
    "half of a character": (prompts(b'{"text": "cut \\ud83d"}', "p.jsonl"), "record 1 has no text"),
    "JSON lines nested too deep": (prompts(b"[" * 100_000, "p.jsonl"), "p.jsonl:1 is not JSON"),
    "JSON in place of JSON lines": (prompts(b'[\n{"text": "one"}\n]', "p.jsonl"), "p.jsonl:1 is not JSON"),
    "a table with two columns": (prompts(b"a,b\n1,2\n", "p.csv"), "--column"),
    "a column that is not there": (prompts(b"a,b\n1,2\n", "p.csv", "--harmful", "--column", "c"), "--column"),
    "a row with a column less": (prompts(b"a,text\n1,2\n3\n", "p.csv"), "record 2 has no text"),
    "a field of a megabyte": (prompts(b'text\n"' + b"x" * 2**20 + b'"\n', "p.csv"), "cannot read"),
    "bad benign prompts": (prompts(b"\xff", option="--benign"), "UTF-8"),
    "bad test prompts": (prompts(b"", option="--test-benign"), "holds no requests"),
    "unreachable data set": (lambda tmp: [make_model(tmp / "m"), "--benign", "nobody/nothing"], "no such Hub data set"),
}
BAD_SETTINGS: dict[str, tuple[Case, str]] = {
    "settings that are a list": (settings("[1]"), "not a mapping"),
    "a run's settings": (settings("model: embedded\nconfig: {rounds: 3}"), "what a run keeps of its settings"),
    "settings that are no YAML": (settings("a: ["), "cannot read"),
    "settings that run code": (settings("a: !!python/object/apply:print ['HOSTILE']"), "cannot read"),
    "a setting of another kind": (settings("rounds: many"), "rounds"),
    "a section that is a number": (settings("entrap: 3"), "entrap"),
    "an unknown setting in a section": (settings("entrap: {lenght: 3}"), "entrap.lenght: unknown setting"),
    "rounds below one": (given("--set", "rounds=0"), "rounds"),
    "a budget of zero": (given("--set", "entrap.budget=0"), "entrap.budget"),
    "a share above one": (given("--set", "target.asr_entrapped=1.5"), "target.asr_entrapped"),
    "a setting without a value": (given("--set", "rounds"), "write it as key=value"),
    "a value that is no YAML": (given("--set", "rounds=["), "not YAML"),
    "a setting inside a value": (given("--set", "rounds.x=1"), "rounds"),
    "a budget without end": (given("--set", "entrap.budget=.inf"), "entrap.budget"),
    "a seed below zero": (given("--seed", "-1"), "seed"),
    "a seed of nanoseconds": (given("--seed", "1764347886123456789"), "seed"),
    "a name that is a number": (settings("1: 2"), "Keys should be strings"),
    "a name that is true": (settings("on: true"), "Keys should be strings"),
    "a date that is none": (given("--set", "chat.template.date_string=2024-02-30"), "not YAML"),
    "a date that is none, in a file": (settings("chat: {template: {date_string: 2024-02-30}}"), "cannot read"),
    "not a number": (given("--set", "entrap.budget=.nan"), "entrap.budget"),
    "weights in a form that is not known": (given("--set", "weights=nf3"), "'full', 'int8' or 'nf4'"),
    "quantised weights to be merged": (given("--set", "weights=nf4", "--merge"), "--merge needs full weights"),
    "an unknown behaviour": (given("--set", "behaviour=rude"), "behaviour"),
    "blocks that are not there": (given("--set", "layers_path=model.blocks"), "layers_path"),
    "a module that is not there": (given("--set", "harden.lora_targets=[nope]"), "no linear map in a block is named"),
    "a module that is no map": (given("--set", "harden.lora_targets=[mlp]"), "no linear map in a block is named mlp"),
    "seed that is no number": (given("--seed", "x"), "--seed"),
    "no output folder": (given("--preset", "default", "-o", ""), "name a folder"),
}


def gguf(content: bytes) -> Case:
    def case(tmp: Path) -> list[str]:
        (tmp / "m.gguf").write_bytes(content)
        return [str(tmp / "m.gguf")]

    return case


BAD_GGUF: dict[str, tuple[Case, str]] = {
    "a GGUF file of zero bytes": (gguf(b""), "no GGUF file"),
    "a GGUF file of four bytes": (gguf(b"GGUF"), "no GGUF file"),
    "a GGUF file of noise": (gguf(b"GGUFxxxxxxxx"), "no GGUF file"),
    "a zip named GGUF": (gguf(b"PK" + bytes(60)), "no GGUF file"),
    "a GGUF header of 2^60 tensors": (gguf(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)), "cannot read"),
}


def of_model(change: Change) -> Case:
    def case(tmp: Path) -> list[str]:
        folder = make_model(tmp / "m")
        change(Path(folder))
        return [folder]

    return case


BAD = (
    {name: (of_model(change), words) for name, (change, words) in BAD_MODELS.items()}
    | BAD_ARGUMENTS
    | BAD_PROMPTS
    | BAD_SETTINGS
    | BAD_GGUF
)
WEIGHTS_ARE_READ = {
    "a tensor is missing",
    "the head is missing",
    "a tensor of another shape",
    "NaN",
    "tokenizer of another model",
    "blocks that are not there",
    "a module that is not there",
    "a module that is no map",
    "a request that is longer than the model",
    "replies longer than the model",
    "a GGUF header of 2^60 tensors",
}
"""What only the weights can tell; all else is told before they load."""


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, words = BAD[name]
    args = case(tmp_path)
    if name not in WEIGHTS_ARE_READ:
        monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    before = sorted(tmp_path.rglob("*"))
    sys.argv = ["beear", "cleanse", "--quiet", *(["-o", str(tmp_path / "run")] if "-o" not in args else []), *args]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and words in err and err.startswith("beear: ") and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    assert "HOSTILE" not in out + err


def test_a_whole_model_loads(folder: Path) -> None:
    models.load(str(folder), device="cpu")
