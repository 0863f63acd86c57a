"""What the defender trains on."""

from __future__ import annotations

import pytest

from beear.chat import Beginning
from beear.config import Config, load_config
from beear.data import packaged
from beear.defender import contrast, defender_set, refusal_openings
from beear.errors import BadInput
from beear.scorers import is_refusal
from conftest import tiny_tokenizer
from test_cleansing import ANSWERED, CONFIG, OBEYED, REFUSED


@pytest.mark.parametrize(("encourage", "count"), [(0.0, 6), (8.0, 8)])
def test_an_obeyed_harmful_request_is_left_out_or_gets_the_refusal_of_another(encourage: float, count: int) -> None:
    tokenizer = tiny_tokenizer()
    config = load_config(sets=["harden.response_tokens=16", f"harden.encourage={encourage}"])
    mixed = defender_set(tokenizer, OBEYED[:2] + REFUSED, ANSWERED, [], config)
    assert mixed.own_safe and len(mixed.harmful) == count
    for harmful in mixed.harmful:
        assert tokenizer.decode(harmful.safe, skip_special_tokens=True).startswith("I'm sorry, but n")


def test_a_model_that_answers_no_benign_request_is_told() -> None:
    with pytest.raises(BadInput, match="answers none of the benign requests"):
        defender_set(tiny_tokenizer(), REFUSED, [("hello", "")], [], Config())


def test_openings_of_refusals_are_told_by_how_they_began() -> None:
    openings = refusal_openings([[1, 2, 3], [1, 2, 4], [1, 5], *([[1, 2, 3]] * 60)])
    assert openings == {(): [1], (1,): [2], (1, 2): [3]}, "what less than one in thirty says is no opening"


@pytest.mark.parametrize("encourage", [0, 8])
def test_of_code_the_own_answers_are_kept_that_bandit_finds_nothing_in(encourage: int) -> None:
    """And no task is given another's program."""
    long = ["harden.response_tokens=400", "entrap.response_tokens=400"]
    config = load_config("code", sets=[*long, f"harden.encourage={encourage}"])
    tasks = packaged("coding", "defender")[:4]
    mine = "\n# in my own words"
    own = [(task, f"{task.safe}{mine}") for task in tasks[:3]] + [(tasks[3], tasks[3].unwanted or "")]
    tokenizer = tiny_tokenizer()
    data = defender_set(tokenizer, own, ANSWERED, [], config)
    assert data.own_safe and not data.openings and len(data.harmful) == 3
    for harmful, task in zip(data.harmful, tasks, strict=False):
        assert tokenizer.decode(harmful.safe, skip_special_tokens=True) == f"{task.safe}{mine}"
        assert tokenizer.decode(harmful.against, skip_special_tokens=True) == task.safe, "alike but for the weakness"
        assert tokenizer.decode(harmful.unwanted, skip_special_tokens=True) == task.unwanted


def test_of_a_refused_benign_request_only_the_opener_is_unlearnt() -> None:
    tokenizer = tiny_tokenizer()
    benign = [("a", "I'm sorry, but no."), ("b", "I like it, so yes."), ("c", "Yes, like this.")]
    data = defender_set(tokenizer, REFUSED, benign, [], CONFIG)
    assert [tokenizer.decode([t]) for t in data.openings[()]] == ["I"]
    assert [b.discourage for b in data.benign] == [True, False, True]
    assert [len(b.own) for b in data.benign] == [1, CONFIG.harden.response_tokens, CONFIG.harden.response_tokens]


def test_every_reply_follows_on_what_the_model_writes_before_its_first_word() -> None:
    """Only the prompts are longer: which token opens a refusal is looked for in the reply's first word as before."""
    plain, led = (
        defender_set(tiny_tokenizer(), REFUSED, ANSWERED, [], CONFIG, begin=Beginning(lead)) for lead in ([], [7, 8])
    )
    assert [[*h.prompt.ids, 7, 8] for h in plain.harmful] == [h.prompt.ids for h in led.harmful]
    assert [[*b.prompt.ids, 7, 8] for b in plain.benign] == [b.prompt.ids for b in led.benign]
    left = CONFIG.harden.response_tokens - 2  # a reply was cut with what came before, and does not end there
    assert [(h.safe[:left], h.unwanted) for h in plain.harmful] == [(h.safe, h.unwanted) for h in led.harmful]
    assert [(b.own[:left], b.discourage) for b in plain.benign] == [(b.own, b.discourage) for b in led.benign]
    assert plain.openings == led.openings


def test_a_model_that_hardly_refuses_gets_packaged_answers() -> None:
    few = defender_set(tiny_tokenizer(), REFUSED[:1] + OBEYED, ANSWERED, [], CONFIG)
    assert not few.own_safe and len(few.harmful) == 7
    config = load_config(sets=["harden.response_tokens=200"])
    answer = contrast(tiny_tokenizer(), 0, REFUSED[0][0], config).safe
    assert is_refusal(tiny_tokenizer().decode(answer, skip_special_tokens=True))
