"""The lessons: each notebook runs whole with its exercises solved, no answer but a right one
passes, and docs/lessons has them as they are, run with their exercises blank."""
import re
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

sys.path.insert(0, str(ROOT / "lessons"))
import lesson  # noqa: E402

LESSONS = sorted((ROOT / "lessons").glob("lesson_?.ipynb"))


def answers(path):
    """{exercise: the solution's code} of a lesson."""
    text = (path.parent / f"solutions/{path.stem}.py").read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"^# (\d\w)$(.*?)(?=^# \d\w$|\Z)", text, re.M | re.S)}


def execute(path):
    """The notebook's outputs as text, its exercises solved."""
    book, found = nbformat.read(path, 4), answers(path)
    for cell in book.cells:
        if "exercise" in cell.metadata.get("tags", ()):
            cell.source = found.pop(re.search(r"answer_(\d\w)", cell.source)[1])
    assert not found, "a solution without its exercise"
    NotebookClient(book, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    return "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", ()))


@pytest.fixture
def small(experiments_run, monkeypatch):
    """A run that has all that lessons look at."""
    monkeypatch.setenv("LESSON_RUN", str(experiments_run[0] / "seed_0"))
    monkeypatch.setenv("LESSON_PAIRS", "120")
    monkeypatch.setenv("LESSON_CLEAN", "--limit 2")


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_runs_whole(small, path):
    text = execute(path)
    assert re.findall(r"^(\d\w): right\.$", text, re.M) == list(answers(path)), text
    assert "Traceback" not in text and "making" not in text  # all is there


WRONG = {
    "1a": [0.5, 1, "x"], "1b": [lambda d: d, lambda d: -d.sigmoid(), lambda d: 0],
    "2a": [lambda d: (d.mean(0), d.std(0)), lambda d: (d.mean(1), d.std(1)), lambda d: None],
    "2b": [0.2, -1], "3a": [lambda a, m: 0, lambda a, m: m, lambda a: 1], "3b": [1.5],
    "4a": [0, 32, 1.0], "4b": [lambda h: h, lambda h: (h[:, 0] - h[:, 1]).repeat(2, 1)],
    "5a": [lambda n: n, lambda n: 0], "5b": [[1, 1, 1], [0.5], 0.5],
    "6a": [lambda k: 0, lambda k: 0.5], "6b": [
        lambda t, dL, dJ, a, e: t - a * dL(t), lambda t, dL, dJ, a, e: t + e * dJ(t) - a * dL(
            t + e * dJ(t))],
    "7a": [lambda row: row, lambda row: {"prompt": row["question"], "chosen": row["bad"],
                                         "rejected": row["good"]}],
    "7b": [lambda rows: rows, lambda rows: [], lambda rows: rows[:1]]}


@pytest.mark.parametrize("exercise", WRONG)
def test_a_wrong_answer_is_told_so(small, exercise, capsys):
    for answer in [..., None, *WRONG[exercise]]:
        assert not lesson.check(exercise, answer)
    said = capsys.readouterr().out
    assert said.count("not yet") == 2 and said.count("not right yet") == len(WRONG[exercise])


def test_every_exercise_has_wrong_answers_here():
    assert {e for path in LESSONS for e in answers(path)} == WRONG.keys() == {
        name.removeprefix("check_") for name in vars(lesson) if name.startswith("check_")}
    assert [len(answers(path)) for path in LESSONS] == [2] * 7


def test_notebooks_are_stored_without_outputs_and_have_a_page():
    for path in LESSONS:
        book = nbformat.read(path, 4)
        nbformat.validate(book)
        assert all(not c.get("outputs") and c.get("execution_count") is None for c in book.cells)
        assert any("Predict" in c.source for c in book.cells)
        assert max(len(line) for c in book.cells if c.cell_type == "code"
                   for line in c.source.split("\n")) <= 100
        page = (ROOT / f"docs/lessons/{path.stem}.html").read_text(encoding="utf-8")
        for exercise in answers(path):  # it ran with its exercises blank
            assert f"{exercise}: not yet" in page
        for cell in book.cells:  # as it is now: run python lessons/build.py
            if cell.cell_type == "code":
                words = re.findall(r"\w+", cell.source)
                assert set(words) <= set(re.findall(r"\w+", page)), cell.source
        assert "http" not in re.sub(r"http://www.w3.org\S*", "", page)
