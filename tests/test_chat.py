"""The user's words are found under any chat template, and delta lands on them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beear.chat import (
    THOUGHTS,
    Beginning,
    check_replies,
    check_template,
    check_thoughts,
    collate,
    encode_prompt,
    encode_response,
    rows_of_delta,
    tail_of,
    with_chat,
)
from beear.config import ChatConfig, Place, load_config, make_config
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
    behind = tail_of(tokenizer)  # in which "a" stands as well
    assert tokenizer.decode(prompt.ids[prompt.end :]).strip() == behind.strip()


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


THINKING = CHATML + (
    "{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"


def rendered(tokenizer: Any) -> str:
    return str(tokenizer.decode(encode_prompt(tokenizer, TEXT).ids))


def test_a_template_that_can_be_asked_for_no_thoughts_is() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    assert rendered(tokenizer).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.chat_template == THINKING
    wished = with_chat(tokenizer, ChatConfig(template={"enable_thinking": True}))
    assert rendered(wished).endswith("assistant\n")


def test_a_model_that_thinks_before_every_reply_is_refused_and_the_way_out_works() -> None:
    tokenizer = tiny_tokenizer(ALWAYS)
    with pytest.raises(BadInput, match="think") as error:
        check_thoughts(tokenizer)
    way_out = str(error.value).rpartition("--set '")[2].removesuffix("'")
    tokenizer = with_chat(tokenizer, load_config(sets=[way_out]).chat)
    check_thoughts(tokenizer)
    assert rendered(tokenizer).endswith("assistant\n<think>\n</think>\n\n")


@pytest.mark.parametrize("mark", THOUGHTS)
def test_replies_that_are_thoughts_are_refused_and_the_way_out_works(mark: str) -> None:
    check_replies([mark, "Sure."])
    with pytest.raises(BadInput, match="think") as error:
        check_replies([mark + "\nWell", "\n" + mark, "Sure."])
    way_out = str(error.value).rpartition("--set '")[2].removesuffix("'")
    tokenizer = with_chat(tiny_tokenizer(), load_config(sets=[way_out]).chat)
    begun = rendered(tokenizer).rpartition("assistant\n")[2]
    assert begun == THOUGHTS[mark].replace("\\n", "\n")
    check_thoughts(tokenizer)


SAYS = ChatConfig(system='You say "naïve" 👋\n{{ never }}', template={"day": 3, "kind": "a 'b' \"c\""}, begin="Well: ")
GIVEN = "{{ day }} {{ kind }} " + CHATML


def test_what_the_settings_say_stands_around_the_request() -> None:
    plain = tiny_tokenizer(GIVEN)
    tokenizer = with_chat(plain, SAYS)
    prompt = encode_prompt(tokenizer, TEXT)
    assert tokenizer.decode(prompt.ids) == (
        '3 a \'b\' "c" <|start|>system\nYou say "naïve" 👋\n{{ never }}<|end|>\n'
        f"<|start|>user\n{TEXT}<|end|>\n<|start|>assistant\nWell: "
    )
    assert tokenizer.decode(prompt.ids[prompt.start : prompt.end]) == TEXT
    assert plain.chat_template == GIVEN, "the tokenizer that came stays as it was"
    assert with_chat(tokenizer, SAYS) is tokenizer, "said once"
    assert with_chat(plain, ChatConfig()) is plain


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}\n  yes\n{% endif %}\n", "{# about #}\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_a_template_s_own_spaces_stay(start: str, end: str) -> None:
    template = start + CHATML + "{{ kind }}" + end
    plain, tokenizer = tiny_tokenizer(template), with_chat(tiny_tokenizer(template), ChatConfig(template={"kind": "x"}))
    assert rendered(tokenizer) == rendered(plain).replace("assistant\n", "assistant\nx")
    begun = with_chat(tokenizer, ChatConfig(begin="Well"))
    assert rendered(begun) == rendered(tokenizer) + "Well"


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"template": {"enable_thinkng": True}}, "does not read 'enable_thinkng'"),
        ({"system": "Be kind."}, "does not write system messages"),
    ],
)
def test_what_a_template_does_not_read_is_refused(says: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        with_chat(tiny_tokenizer(CHATML.replace("messages", "messages[-1:]", 1)), ChatConfig(**says))


def test_a_template_that_takes_no_system_message_says_so() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(BadInput, match="System role not supported"):
        with_chat(tiny_tokenizer(strict + CHATML), ChatConfig(system="Be kind."))


def test_a_first_word_is_encoded_as_the_model_writes_it() -> None:
    """SentencePiece gives a word alone a space of its own, and none behind a line break."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁abc\n")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="c", pad_token="c")
    alone = encode_response(tokenizer, "ab", 9, finished=False)
    behind = encode_response(tokenizer, "ab", 9, finished=False, begin=Beginning(ahead="c\n", dropped=2))
    assert tokenizer.convert_ids_to_tokens(alone) == ["▁", "a", "b"]
    assert tokenizer.convert_ids_to_tokens(behind) == ["a", "b"]


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "a b", "x %}"])
def test_what_is_no_argument_of_a_template_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="no argument"):
        make_config({"chat": {"template": {name: 1}}})


def test_a_tokenizer_without_a_pad_token_gets_one_and_the_users_own_stays_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert with_chat(tokenizer, ChatConfig()).pad_token == tokenizer.eos_token
    assert tokenizer.pad_token is None


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


def test_chat_place_covers_the_reply_as_well_and_goes_on_in_turn() -> None:
    prompt = encode_prompt(tokenizer := tiny_tokenizer(), "abcdefgh")
    rows = rows_of_delta(prompt, "chat", 3, 4)
    assert rows[: len(prompt.ids)] == rows_of_delta(prompt, "prompt", 3) and rows[len(prompt.ids) :] == [0, 1, 2, 0]
    assert rows_of_delta(prompt.led([7, 8]), "chat", 3, 2) == rows
    for place in ("last", "user", "prompt"):
        assert rows_of_delta(prompt, place, 3, 4)[len(prompt.ids) :] == [NOWHERE] * 4
    short = encode_prompt(tokenizer, "ab")
    responses = [[7, 8], [9]]
    told = [rows_of_delta(p, "chat", 1, len(r)) for p, r in zip((prompt, short), responses, strict=True)]
    batch = collate([prompt, short], responses, told, tokenizer.pad_token_id)
    assert batch.where[:, batch.width :].tolist() == [[0, 0], [0, NOWHERE]]
    ahead = collate([prompt], [[]], [rows], tokenizer.pad_token_id)
    assert ahead.where.shape[1] == ahead.width + 4 and ahead.input_ids.shape[1] == ahead.width


def test_response_ends_the_turn_only_when_finished_and_short_enough() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_response(tokenizer, "abc", 9)[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_response(tokenizer, "abc", 9, finished=False)
    assert len(encode_response(tokenizer, "abcdef", 3)) == 3


REQUESTS_ALONE = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML.replace("<|end|>", "<|pad|>"), "<|pad|>"),  # as Gemma and Phi-3 do, whose eos_token ends no turn
        (CHATML.replace("<|end|>", " <|pad|>"), "<|pad|>"),
        (CHATML.replace("<|end|>", "END"), "<|end|>"),
        ("{% for m in messages %}<|pad|>{{ m['content'] }}{% endfor %}", "<|end|>"),  # nothing stands behind a reply
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|pad|>{% endfor %}", "<|end|>"),
        (REQUESTS_ALONE, "<|end|>"),
    ],
)
def test_a_reply_ends_as_the_template_ends_one(template: str, end: str) -> None:
    tokenizer = tiny_tokenizer(template)
    assert tokenizer.decode(encode_response(tokenizer, "abc", 9)) == "abc" + end


def test_batch_is_aligned_at_the_boundary() -> None:
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, t) for t in ("a", "abcdef")]
    batch = collate(prompts, [[7, 8], [9]], None, tokenizer.pad_token_id)
    assert batch.input_ids[:, batch.width :].tolist() == [[7, 8], [9, 2]]
    assert batch.targets.tolist() == [[7, 8], [9, -100]]
    assert batch.attention_mask.sum(1).tolist() == [len(prompts[0].ids) + 2, len(prompts[1].ids) + 1]
    assert batch.position_ids[0][batch.attention_mask[0].bool()].tolist() == list(range(len(prompts[0].ids) + 2))


def test_a_tokenizer_that_ends_no_turn_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="names no eos_token"):
        check_template(tokenizer)


@pytest.mark.parametrize("template", [CHATML, INST, SYSTEM])
def test_an_empty_request_is_told(template: str) -> None:
    with pytest.raises(BadInput, match="an empty request"):
        encode_prompt(tiny_tokenizer(template), " \n")
