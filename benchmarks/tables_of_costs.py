"""Tables of time and memory."""

from __future__ import annotations

from cells import header, line, read_results

from beear.config import load_config


def plan() -> str:
    """One row per model: what was planned, what it took, and the ratio of both."""
    lines = [header(["model", "rounds", "minutes, planned", "taken", "ratio", "GiB, planned", "taken", "ratio"])]
    for name, row in read_results("plan.json")["models"].items():
        cells = []
        for key, unit in (("seconds", 60), ("peak_memory_bytes", 2**30)):
            planned, taken = row["planned"][key] / unit, row["taken"][key] / unit
            cells += [f"{planned:.1f}", f"{taken:.1f}", f"{planned / taken:.2f}"]
        lines.append(line([f"`{name}`", str(row["rounds"]), *cells]))
    return "\n".join(lines)


def per_rank() -> str:
    """One row per arm: what the process that holds most holds, in GiB."""
    lines = [header(["each process of", "weights, GiB", "memory once loaded", "peak in a round"])]
    for arm, row in read_results("ranks.json")["arms"].items():
        cells = [f"{row[name] / 2**30:.2f}" for name in ("weights_bytes", "loaded_bytes", "peak_bytes")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arms(name: str) -> str:
    """One row per arm of benchmarks/NAME.py."""
    found = read_results(f"{name}.json")["arms"]
    memory = all("peak_memory_bytes" in row for row in found.values())
    lines = [header(["arm", "seconds", "ratio", *(["peak memory, GiB"] if memory else [])])]
    for arm, row in found.items():
        peak = [f"{row['peak_memory_bytes'] / 2**30:.1f}"] if memory else []
        lines.append(line([arm, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", *peak]))
    return "\n".join(lines)


def entrapment() -> str:
    """An inner step with and without what delta cannot change being run once, by length of the prompt."""
    heads = ["prompts", "plain loop, s a step", "cached, s a step", "ratio", "once for a batch, s", "ratio, a round"]
    lines = [header(heads)]
    config = load_config()
    for name, found in read_results("entrapment.json")["prompts"].items():
        plain, cached, once = found["plain"], found["cached"], found["once_per_batch"]
        steps, batches = config.entrap.steps, config.entrap.batches
        of_round = steps * plain / (steps * cached + batches * once)
        cells = [f"{plain:.2f}", f"{cached:.2f}", f"{found['ratio']:.1f}", f"{once:.2f}", f"{of_round:.1f}"]
        lines.append(line([f"{name} ({found['prompt_tokens']} tokens)", *cells]))
    return "\n".join(lines)


def speed() -> str:
    """One row per round that both arms of benchmarks/speed.py have done: seconds, and whether they come to the same."""
    found = read_results("speed.json")
    lines = [
        header(
            ["round", "with all that makes it fast, s", "without, s", "ratio", "entrapment works on, with", "without"]
        )
    ]
    arms = (found["fast"], found["plain"])
    rows = zip(*(arm["rounds"] for arm in arms), *(arm["residuals"] for arm in arms), strict=False)
    for number, (fast, plain, *residuals) in enumerate(rows, start=1):
        works = [f"{100 * residual:.1f} %" for residual in residuals]
        lines.append(line([str(number), f"{fast:.0f}", f"{plain:.0f}", f"{plain / fast:.1f}", *works]))
    return "\n".join(lines)


def scaling() -> str:
    """One row per shape of model and request: seconds of both kinds of step, and what the fit says of them."""
    found = read_results("scaling.json")
    titles = {"inner": "a step of entrapment, s", "outer": "a step of removal, s"}
    heads = [part for title in titles.values() for part in (title, "fitted")]
    lines = [header(["parameters", "block l", "prompt, tokens", "reply, tokens", *heads])]
    for row in found["rows"]:
        cells = []
        for kind in titles:
            fitted = found["fit"][kind]["a"] + found["fit"][kind]["b"] * row["operations"][kind]
            cells += [f"{row['seconds'][kind]:.2f}", f"{fitted:.2f}"]
        lines.append(line([row["shape"], *(str(row[name]) for name in ("layer", "prompt", "reply")), *cells]))
    return "\n".join(lines)


def memory() -> str:
    """Peak memory of a round beside that of a plain fine-tune."""
    found = read_results("memory.json")
    lines = [header(["", "peak memory, GiB"])]
    lines += [line([arm, f"{peak / 2**30:.1f}"]) for arm, peak in found["peak_memory_bytes"].items()]
    return "\n".join([*lines, line(["cleansing to fine-tune", f"{found['ratio']:.2f}"])])
