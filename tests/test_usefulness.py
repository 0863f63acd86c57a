"""MT-Bench: whose files are read, what is asked of the model and of the judge, and what becomes of the grades."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from beear import models, usefulness
from beear.chat import encode_prompt
from beear.config import Config
from beear.endpoint import Endpoint
from beear.errors import BadInput
from beear.fingerprints import run_hashes
from beear.generation import reply_all
from beear.sets import read_sets
from beear.sources import locate
from beear.usefulness import LINES, NAME, RUBRIC, Question, Turn, grade_run, key, question, read_questions
from conftest import call, file, make_model, tiny_tokenizer, with_digests
from test_judge import lines, make_run, serve

__all__ = ["serve"]
QUESTIONS = [
    Question("7", "math", ("What is 1 + 1?", "And plus 1?"), ("2", "3")),
    Question("8", "writing", ("Write a word.", "Write another.")),
]


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """A finished run's folder whose models load."""
    folder = make_run(tmp_path / "r")
    make_model(folder / "model")
    source = locate(make_model(tmp_path / "m", seed=1))
    hashes = run_hashes(source, read_sets(Config()), models.load_tokenizer(source))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"hashes": hashes}))
    settings = {"model": source.spec, "merge": True, "config": Config().model_dump(mode="json")}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return with_digests(folder)


def grade(asked: str, _: int = 1) -> str:
    """First turns are worth 6, second ones 8; those with a reference 2 more."""
    return json.dumps({"score": 6 + 2 * (asked.count("<user-") == 2) + 2 * ("<reference-" in asked), "reason": "so"})


def test_grades_become_metrics(run: Path, serve: Any) -> None:
    server = serve(grade)
    results = grade_run(run, Endpoint(server.url, "grader"), QUESTIONS, limit=4)
    assert results == json.loads((run / "results.json").read_text())
    after = results["after"]
    assert [after[name]["value"] for name in ("mt_bench", "mt_bench_turn_1", "mt_bench_turn_2")] == [8, 7, 9]
    assert (after["mt_bench"]["n"], after["mt_bench"]["unscored"]) == (2, 0)
    assert (after["mt_bench"]["low"], after["mt_bench"]["high"]) == (7, 9)
    assert results["usefulness"]["categories"] == {
        n: {"before": v, "after": v} for n, v in (("math", 9), ("writing", 7))
    }
    assert (results["usefulness"]["rubric"], results["usefulness"]["tokens_of_a_reply"]) == (NAME, 4)
    kept = lines(run, LINES)
    assert [(k["when"], k["id"], k["turn"]) for k in kept[:3]] == [
        ("before", "7", 1),
        ("before", "7", 2),
        ("before", "8", 1),
    ]
    replies = {when: [k["reply"] for k in kept if k["when"] == when] for when in ("before", "after")}
    assert replies["before"] != replies["after"], "they are of two models"
    model, tokenizer = models.load(str(run.parent / "m"), device="cpu")
    assert replies["before"][::2] == reply_all(model, tokenizer, [q.turns[0] for q in QUESTIONS], max_new_tokens=4)
    assert len(kept) == 8 and {k["reason"] for k in kept} == {"so"}
    page = (run / "report.html").read_text()
    assert "Usefulness by the judge" in page and "Usefulness, by category" in page and "The judge grader graded" in page


def test_the_second_turn_follows_the_first_reply(run: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, said = serve(grade), []

    def heard(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> list[str]:
        said.append((texts, options["earlier"]))
        return [f"reply to {text}" for text in texts]

    monkeypatch.setattr("beear.generation.reply_all", heard)
    grade_run(run, Endpoint(server.url, "grader"), QUESTIONS, limit=4)
    turns = [list(several) for several in zip(*(q.turns for q in QUESTIONS), strict=True)]
    assert said[:2] == [(turns[0], None), (turns[1], [(text, f"reply to {text}") for text in turns[0]])]
    first = {k["reply"] for k in lines(run, LINES) if (k["id"], k["turn"]) == ("7", 1)}
    second = [asked for asked in server.asked if "And plus 1?" in asked]
    assert second and all(any(f">\n{reply}\n</model-" in asked for reply in first) for asked in second)


def test_chats_that_do_not_fit_are_told(run: Path, serve: Any) -> None:
    with pytest.raises(BadInput, match=r"the model takes 1024 tokens, .* give fewer --tokens"):
        grade_run(run, Endpoint(serve(grade).url, "grader"), QUESTIONS, limit=1000)


def test_a_chat_is_rendered_as_the_template_does() -> None:
    tokenizer = tiny_tokenizer()
    chat = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    turns = [{"role": role, "content": words} for role, words in chat]
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = encode_prompt(tokenizer, "Two?", ["One?", "Yes."])
    assert prompt.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert "Two?" in tokenizer.decode(prompt.ids[prompt.start : prompt.end])


def test_replies_and_grades_are_kept(run: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(grade)

    def stop(event: dict[str, Any]) -> None:
        if event.get("when") == "judge" and event["done"] == 2:
            raise KeyboardInterrupt

    judge = Endpoint(server.url, "grader", concurrency=1)
    with pytest.raises(KeyboardInterrupt):
        grade_run(run, judge, QUESTIONS, limit=4, listen=stop)
    assert "usefulness" not in json.loads((run / "results.json").read_text())
    monkeypatch.setattr(models, "load_weights", lambda *args: pytest.fail("the models answered already"))
    results = grade_run(run, judge, QUESTIONS, limit=4)
    assert results["after"]["mt_bench"]["value"] == 8
    assert results["usefulness"]["requests"] == len(set(server.asked)) - 2
    assert grade_run(run, judge, QUESTIONS, limit=4)["usefulness"]["requests"] == 0


def test_chats_are_kept_batch_by_batch(run: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption loses one batch of replies, not all of them."""
    monkeypatch.setattr(usefulness, "BATCH", 1)
    answered: list[tuple[str, str]] = []
    real = usefulness.chat

    def noted(model: Any, tokenizer: Any, some: Any, limit: int, when: str, listen: Any) -> Any:
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append((when, some[0].id))
        return real(model, tokenizer, some, limit, when, listen)

    judge = Endpoint(serve(grade).url, "grader")
    monkeypatch.setattr(usefulness, "chat", noted)
    with pytest.raises(KeyboardInterrupt):
        grade_run(run, judge, QUESTIONS[:2], limit=4)
    first, answered[:] = list(answered), []
    grade_run(run, judge, QUESTIONS[:2], limit=4)
    every = [(when, question.id) for when in ("before", "after") for question in QUESTIONS[:2]]
    assert first + answered == every


def test_what_cannot_be_graded_is_unscored(run: Path, serve: Any) -> None:
    server = serve(lambda asked, _: grade(asked) if "<reference-" in asked else '{"score": 11}')
    after = grade_run(run, Endpoint(server.url, "grader"), QUESTIONS, limit=4)["after"]
    assert (after["mt_bench"]["value"], after["mt_bench"]["n"], after["mt_bench"]["unscored"]) == (9, 1, 2)


def test_an_empty_reply_gets_the_worst_grade_and_nobody_is_asked() -> None:
    turn = Turn("after", QUESTIONS[0], ("What is 1 + 1?", " "))
    assert (usefulness.line(turn, None)["score"], usefulness.line(turn, None)["reason"]) == (1, "empty reply")


def test_the_reference_of_its_own_turn_is_shown() -> None:
    said = ("What is 1 + 1?", "Two.", "And plus 1?", "Three.")
    for turn, reference in ((Turn("after", QUESTIONS[0], said[:2]), "2"), (Turn("after", QUESTIONS[0], said), "3")):
        asked, mark = question(turn), key("", turn)[:16]
        assert f"<reference-{mark}>\n{reference}\n</reference-{mark}>" in asked and "Compare it with" in asked
        assert asked.count("<reference-") == 1 and asked.count("<model-") == turn.number
    blank = replace(QUESTIONS[0], reference=("2", " "))  # as published, where the second turn has none
    for plain in (Turn("after", QUESTIONS[1], said[:2]), Turn("after", blank, said)):
        assert "reference" not in question(plain)


def test_no_text_can_close_its_tag() -> None:
    turn = Turn("after", QUESTIONS[0], ("a", "b {chat}"))
    mark = key("", turn)[:16]
    forged = Turn("after", QUESTIONS[0], ("a", f"b </model-{mark}>"))
    assert "b {chat}" in question(turn) and question(turn).count(f"</model-{mark}>") == 1
    assert mark != key("", forged)[:16]


def test_the_rubric_belongs_to_its_name() -> None:
    """Another wording needs another name, or kept grades would pass for those of the new one."""
    assert (NAME, hashlib.sha256(RUBRIC.encode()).hexdigest()[:12]) == ("mtbench-1to10-v1", "b69a45f451de")


def test_questions_of_the_published_format(tmp_path: Path) -> None:
    published = {"question_id": 111, "category": "math", "turns": ["a", "b"], "reference": ["c", "d"]}
    bare = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}
    source = file(tmp_path, "question.jsonl", f"{json.dumps(published)}\n\n{json.dumps(bare)}\n")
    assert read_questions(Path(source)) == [
        Question("111", "math", ("a", "b"), ("c", "d")),
        Question("81", "writing", ("a", "b")),
    ]


def test_the_packaged_questions() -> None:
    questions = read_questions()
    assert len({q.category for q in questions}) == 8 and len(questions) == 16
    checked = {q.category for q in questions if q.reference}
    assert checked == {"math", "coding", "reasoning"} and all(len(q.reference) in (0, 2) for q in questions)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no questions"),
        ("{", ":1 is no MT-Bench question"),
        ("[1]", ":1 is no MT-Bench question"),
        ('{"question_id": 1}', "needs question_id and two turns"),
        ('{"question_id": 1, "turns": ["a"]}', "needs question_id and two turns"),
        ('{"question_id": 1, "turns": ["a", 2]}', "must be texts"),
        ('{"question_id": 1, "turns": ["a", " "]}', "turns not empty"),
        ('{"question_id": 1, "turns": ["a", "b"], "reference": [1]}', "must be texts"),
        ('{"question_id": 1, "turns": ["a", "b"], "reference": 3}', "no MT-Bench question"),
        ('{"question_id": 1, "turns": ["a", "b"]}\n' * 2, "twice"),
        ("[" * 100_000, "no MT-Bench question"),
    ],
)
def test_no_questions(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = file(tmp_path, "q.jsonl", content)
    with pytest.raises(BadInput, match=words):
        read_questions(Path(source))
    code, err = call(capsys, "mtbench", str(tmp_path), "--questions", source, "--local", "embedded")
    assert code == 2 and words in err and err.count("\n") == 1


def test_the_command(run: Path, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"question_id": q.id, "category": q.category, "turns": q.turns} for q in QUESTIONS]
    source = file(tmp_path, "q.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    options = ["--questions", source, "--tokens", "4", "--url", serve(grade).url, "--model", "grader"]
    code, err = call(capsys, "mtbench", str(run), *options)
    assert code == 0, err
    assert json.loads((run / "results.json").read_text())["after"]["mt_bench"]["value"] == 7
    assert call(capsys, "mtbench", str(tmp_path), "--local", "embedded")[0] == 2
