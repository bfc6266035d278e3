"""Exact match and preferences of a model whose answers are known, and wrong questions."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mooshak_torch
from mooshak.config.sections import SourceConfig
from mooshak.data.conversations import Conversation
from mooshak.errors import InputError
from mooshak.evaluation.exact_match import (
    Answer,
    Question,
    answer_questions,
    exact_match,
    exact_match_parser,
    is_match,
    pairs_of,
    questions_of,
    read_questions,
    run_exact_match,
)
from mooshak.evaluation.preferences import preference_accuracy
from mooshak.generation.completion import Completion
from mooshak.generation.lm import LM


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_match_but_for_white_space_and_normal_form() -> None:
    assert is_match(" घर में\n", "घर में")
    assert is_match("क\u093c", "\u0958") and is_match("e\u0301", "é")
    assert not is_match("घर", "घर में") and not is_match("A mouse", "a mouse")


def test_scores_count_right_and_unfinished_answers_by_language() -> None:
    hi, en = Question("क", "हाँ", "hi"), Question("a", "yes", "en")
    answers = [Answer(hi, "हाँ", True), Answer(hi, "नहीं", True), Answer(en, "yes", False)]
    assert exact_match(answers) == {
        "hi": {"exact_match": 0.5, "questions": 2, "unfinished": 0},
        "en": {"exact_match": 0.0, "questions": 1, "unfinished": 1},
    }


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Path) -> LM:
    return mooshak_torch.load(tiny_checkpoint, "float64")


def test_answers_are_the_greedy_ones_of_a_chat(lm: LM) -> None:
    questions = [Question(user(f"lion {i}"), "x", "en") for i in range(3)]
    questions.append(Question("the mouse", "x", "en"))
    answers = list(answer_questions(lm, questions, max_new_tokens=5))
    wanted: list[Any] = [
        lm.chat(one.prompt, temperature=0.0, max_new_tokens=5) for one in questions[:3]
    ]  # type: ignore[arg-type]
    wanted.append(lm.generate("the mouse", temperature=0.0, max_new_tokens=5))
    assert [one.text for one in answers] == [one.text for one in wanted]
    assert [one.finished for one in answers] == [one.finish_reason == "stop" for one in wanted]


def test_known_answers_are_counted(lm: LM, tmp_path: Path, capsys: Any) -> None:
    """A model that answers every question but one, through the command's own functions."""
    parser = exact_match_parser("mooshak_torch.exact_match", "")
    out = tmp_path / "answers.jsonl"
    args = parser.parse_args(["X", "--count", "4", "--json", "--out", str(out)])
    questions = questions_of(args)
    assert len(questions) == 8 and {one.language for one in questions} == {"hi", "en"}

    class Knows(type(lm)):  # type: ignore[misc]
        asked = 0

        def _complete(self, prompts: Sequence[list[int]], *_: Any) -> list[Completion]:
            found = []
            for ids in prompts:
                answer = questions[self.asked].answer if self.asked else "?"
                found.append(Completion(f"{answer} ", [], None, "stop", ids))
                self.asked += 1
            return found

    knows = Knows.__new__(Knows)
    knows.__dict__.update(lm.__dict__)
    run_exact_match(args, questions, [], lambda *_, **__: knows)
    scores = json.loads(capsys.readouterr().out)
    assert scores["hi"]["exact_match"] == 0.75 and scores["en"]["exact_match"] == 1.0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["is_right"] for row in rows] == [False] + [True] * 7
    assert rows[0]["text"] == "? " and rows[0]["prompt"] == questions[0].prompt


def test_preference_accuracy_compares_the_answers(lm: LM) -> None:
    assert lm.tokenizer is not None
    pairs = [
        Conversation("", "preference", f"lion {i}", (f"mouse {i}", f"water {i * 7}"), None, "en")
        for i in range(6)
    ]

    def log_p(prompt: str, answer: str) -> float:
        tokenizer = lm.tokenizer
        assert tokenizer is not None
        start = tokenizer.encode(prompt, bos=True)
        rest = [*tokenizer.encode(answer, bos=False), tokenizer.eos_id]
        return float(lm.score(start + rest)[len(start) - 1 :].sum())

    wanted = np.mean(
        [log_p(one.prompt, one.answers[0]) > log_p(one.prompt, one.answers[1]) for one in pairs]
    )  # type: ignore[arg-type]
    assert 0 < wanted < 1
    assert preference_accuracy(lm, pairs) == {"en": {"preference_accuracy": wanted, "pairs": 6}}


def test_wrong_questions_are_errors(tmp_path: Path) -> None:
    def read(record: dict[str, Any]) -> list[Question]:
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
        return read_questions(SourceConfig("a", kind="jsonl", path=str(tmp_path / "a.jsonl")))

    assert (
        read({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]})[0].answer
        == "b"
    )
    assert read({"prompt": "a", "answer": "b", "language": "hi"})[0].language == "hi"
    with pytest.raises(InputError, match="line 1: a question needs the fields prompt"):
        read({"prompt": "a"})
    with pytest.raises(InputError, match="line 1: the answer is empty"):
        read({"prompt": "a", "answer": " "})
    none = argparse.Namespace(count=0, jsonl=None, out=None, seed=0)
    with pytest.raises(InputError, match="--count 0"):
        questions_of(none)
    with pytest.raises(InputError, match="task 1 is no pair"):
        pairs_of(argparse.Namespace(count=1, seed=0, preferences="questions"))
