"""Tasks about the tales: parallel in both languages, and right by the text of the tale."""

from itertools import islice

import pytest

from mooshak.config.sections import SourceConfig
from mooshak.corpus.tasks import TASKS, task_records
from mooshak.corpus.tasks.questions import questions
from mooshak.errors import InputError


def test_answers_stand_in_the_text_of_the_question() -> None:
    kinds = set()
    for one in islice(questions(3), 400):
        kinds.add(one.kind)
        assert one.answer["en"].split()[-1].lower() in one.text["en"].lower()
        # In the text a Hindi word may be oblique: its beginning is the same.
        words = one.answer["hi"].removeprefix("एक").split()
        assert all(word[:2] in one.text["hi"] for word in words)
        assert all(text.endswith("?") for text in one.question.values())
    assert kinds == {"name", "who", "place", "quality"}
    one = next(one for one in questions(0) if one.kind == "place")
    assert one.question == {"hi": "लकड़हारा कहाँ रहता है?", "en": "Where does the woodcutter live?"}
    assert one.answer == {"hi": "एक सुंदर गाँव में", "en": "in a pretty village"}


def test_pairs_prefer_the_right_answer_and_the_asked_language() -> None:
    right = {one.prompt("hi"): one.answer["hi"] for one in islice(questions(0), 200)}
    pairs = list(islice(TASKS["right_answer"](0, "hi"), 50))
    for pair in pairs:
        prompt, chosen, rejected = (
            pair[key][0]["content"] for key in ("prompt", "chosen", "rejected")
        )
        assert chosen == right[prompt] and rejected not in prompt
    for pair in islice(TASKS["asked_language"](0, "en"), 50):
        assert pair["chosen"][0]["content"].isascii()
        assert not pair["rejected"][0]["content"].isascii()


def test_translations_are_the_other_language() -> None:
    for into_en, into_hi in islice(
        zip(TASKS["translation"](5, "en"), TASKS["translation"](5, "hi"), strict=True), 40
    ):
        english, hindi = (one["completion"][0]["content"] for one in (into_en, into_hi))
        assert into_en["prompt"][0]["content"] == f"Translate into English: {hindi}"
        assert into_hi["prompt"][0]["content"] == f"हिंदी में अनुवाद करो: {english}"


def test_known_answers_have_no_completion() -> None:
    (one,) = islice(TASKS["known_answers"](0, "hi"), 1)
    assert set(one) == {"prompt", "answer", "task", "language"} and one["answer"]


def test_records_take_tasks_in_turn() -> None:
    source = SourceConfig("t", kind="tasks", path="questions, translation", documents=5)
    found = [record["task"] for record in task_records(source)]
    assert found == ["questions", "translation", "questions", "translation", "questions"]
    with pytest.raises(InputError, match="no task 'question'; did you mean questions"):
        task_records(SourceConfig("t", kind="tasks", path="question"))
    with pytest.raises(InputError, match="no tasks in 'fr'"):
        task_records(SourceConfig("t", kind="tasks", language="fr"))
