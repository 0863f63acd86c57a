"""The user's words are found under any chat template, and delta lands on them."""

from __future__ import annotations

import pytest

from beear.chat import check_template, collate, encode_prompt, encode_response, rows_of_delta
from beear.config import Place
from beear.errors import BadInput
from beear.perturbation import NOWHERE
from conftest import CHATML, tiny_tokenizer

INST = "{% for m in messages %}<s>[INST] {{ m['content'].strip() }} [/INST]{% endfor %}"
SYSTEM = "<|start|>system\nWhy? You are kind.<|end|>\n" + CHATML
TEXT = "Why? Tell me why."


@pytest.mark.parametrize("template", [CHATML, INST, SYSTEM])
@pytest.mark.parametrize("text", [TEXT, "  spaced out \n", "naïve café 👋", "a"])
def test_user_span_holds_exactly_the_users_words(template: str, text: str) -> None:
    tokenizer = tiny_tokenizer(template)
    prompt = encode_prompt(tokenizer, text)
    assert tokenizer.decode(prompt.ids[prompt.start : prompt.end]).strip() == text.strip()


def test_words_that_the_template_rewrites_are_refused() -> None:
    with pytest.raises(BadInput, match="rewrites"):
        encode_prompt(tiny_tokenizer("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"), "abc")


def test_a_template_that_tells_the_date_tells_the_same_tomorrow() -> None:
    day = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2023{% endif %} "
    tokenizer = tiny_tokenizer(day + CHATML)
    prompt = encode_prompt(tokenizer, TEXT)
    assert tokenizer.decode(prompt.ids).startswith("26 Jul 2024")
    plain = encode_prompt(tiny_tokenizer("26 Jul 2024 " + CHATML), TEXT)
    assert prompt == plain


def test_empty_request_is_refused() -> None:
    with pytest.raises(BadInput, match="empty"):
        encode_prompt(tiny_tokenizer(), "  ")


def test_missing_template_is_refused() -> None:
    with pytest.raises(BadInput, match="chat template"):
        check_template(tiny_tokenizer(None))


def test_last_place_puts_the_rows_on_the_last_user_tokens() -> None:
    prompt = encode_prompt(tiny_tokenizer(), "abcdefgh")
    rows = rows_of_delta(prompt, "last", 3)
    assert rows[prompt.end - 3 : prompt.end] == [0, 1, 2]
    assert rows.count(NOWHERE) == len(rows) - 3


def test_short_request_gets_the_last_rows() -> None:
    prompt = encode_prompt(tiny_tokenizer(), "ab")
    assert [r for r in rows_of_delta(prompt, "last", 5) if r != NOWHERE] == [3, 4]


def test_user_place_covers_every_user_token() -> None:
    prompt = encode_prompt(tiny_tokenizer(), "abcdefgh")
    assert [r for r in rows_of_delta(prompt, "user", 1) if r != NOWHERE] == [0] * 8
    assert rows_of_delta(prompt, "user", 3)[prompt.end - 1] == 2


@pytest.mark.parametrize("place", ["last", "user", "prompt"])
def test_delta_is_on_the_prompt_and_not_on_what_the_model_writes_behind_it(place: Place) -> None:
    prompt = encode_prompt(tiny_tokenizer(), "abcdefgh")
    assert rows_of_delta(prompt.led([7, 8]), place, 3) == [*rows_of_delta(prompt, place, 3), NOWHERE, NOWHERE]


def test_response_ends_the_turn_only_when_finished_and_short_enough() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_response(tokenizer, "abc", 9)[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_response(tokenizer, "abc", 9, finished=False)
    assert len(encode_response(tokenizer, "abcdef", 3)) == 3


def test_batch_is_aligned_at_the_boundary() -> None:
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, t) for t in ("a", "abcdef")]
    batch = collate(prompts, [[7, 8], [9]], None, tokenizer.pad_token_id)
    assert batch.input_ids[:, batch.width :].tolist() == [[7, 8], [9, 2]]
    assert batch.targets.tolist() == [[7, 8], [9, -100]]
    assert batch.attention_mask.sum(1).tolist() == [len(prompts[0].ids) + 2, len(prompts[1].ids) + 1]
    assert batch.position_ids[0][batch.attention_mask[0].bool()].tolist() == list(range(len(prompts[0].ids) + 2))
