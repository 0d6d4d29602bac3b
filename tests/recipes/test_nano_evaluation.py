"""The questions of nano's evaluation, what they count, and the records that come of them."""

import json
import shutil

import pytest
from PIL import Image

from mg_fast.models import builtin
from recipes.nano import evaluate as evaluation
from recipes.nano import rounding
from recipes.nano.evaluate import Asked, measure
from recipes.nano.varied_questions import VARIED_KINDS, varied_questions
from tests.paths import ROOT

RESULTS = ROOT / "bench" / "results"


def test_every_kind_of_question_is_asked():
    asked = list(varied_questions(0, 0, 6))
    assert {question.kind for question in asked} == set(VARIED_KINDS)
    for question in asked:
        shown = sum(len(images) for _, images in question.turns)
        assert shown == {"wish, any order": 0}.get(question.kind, 2 if "picture" in question.kind else 1), question
        if question.kind == "one digit":
            assert len(question.answer) == len("The number is 1.")
        if question.kind == "no shapes":
            assert "othing on a " in question.answer or question.answer.startswith("There are no ")
        if question.kind == "shapes alike":
            assert ", another " in question.answer, question.answer
    again = list(varied_questions(0, 0, 6))
    assert [(question.turns[-1][0], question.answer) for question in asked] == [
        (question.turns[-1][0], question.answer) for question in again
    ]


class Told:
    """Stands for a pipeline that gives the same answer to everything."""

    def __init__(self, text: str):
        self.text, self.error, self.turns = text, None, []

    def chat_batch(self, turns, **options):
        return [self] * len(turns)

    def conversation(self):
        return self

    def chat(self, text, images, **options):
        self.turns.append((text, len(images)))
        return self


def test_only_the_last_answer_of_a_conversation_counts():
    picture = Image.new("RGB", (8, 8))
    questions = [
        Asked(0, ["a"], [("What?", [picture])], "Yes."),
        Asked(1, ["b"], [("What?", [picture]), ("And now?", [picture])], "Yes."),
        Asked(2, ["b"], [("What?", []), ("And now?", [])], "No."),
    ]
    told = Told("Yes.")
    shares, wrong = measure({"one": told}, iter(questions), ["a", "b", "c"])
    assert shares == {"one": {"a": 1.0, "b": 0.5}, "asked": {"a": 1, "b": 2}}
    assert told.turns == [("What?", 1), ("And now?", 1), ("What?", 0), ("And now?", 0)]
    assert wrong == [
        {"model": "one", "scene": 2, "kind": "b", "asked": "What? | And now?", "said": "Yes.", "right": "No."}
    ]


@pytest.mark.slow
def test_a_model_that_was_asked_is_not_asked_again(tmp_path, monkeypatch):
    nano, asked, measure = builtin.resolve("nano"), [], evaluation.measure

    def ask(*arguments: str) -> dict:
        command = ["nano", str(nano), "--count", "2", "--varied", "1", "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", [*command, *arguments])
        evaluation.main()
        return json.loads((tmp_path / "out").read_text())

    one = ask()
    monkeypatch.setattr(evaluation, "measure", lambda names, *rest: asked.append(list(names)) or measure(names, *rest))
    other = tmp_path / "without"
    shutil.copytree(nano, other, ignore=shutil.ignore_patterns("training.json", "painter"))
    two = ask("--without", str(other))
    assert asked == [["trained without"]] * 2
    for part in ("exact", "varied"):
        # The weights are the same.
        assert two[part].pop("trained without") == two[part]["with mining"] and two[part] == one[part]
    assert set(two["conditions"]["sha256 of weights"]) == {"with mining", "trained without"}
    assert two["wrong, first 40"] == one["wrong, first 40"] and two["speed"] == one["speed"]
    # What is known is not lost where less is asked for.
    with pytest.raises(SystemExit) as done:
        ask()
    assert done.value.code == 0 and len(asked) == 2
    assert "trained without" in json.loads((tmp_path / "out").read_text())["exact"]
    # Other questions are put to all models.
    ask("--without", str(other), "--seed", "7")
    assert asked[2:] == [["with mining", "mined features zero", "trained without"]] * 2


def test_rounding_counts_answers_that_are_those_of_float32(monkeypatch):
    shares = {"asked": {"number": 8, "number, never seen": 3, "count": 2}}
    rows = [("float32", 1, "x"), ("int8", 1, "x"), ("int8", 2, "y"), ("int4", 1, "z"), ("int4", 3, "w")]
    wrong = [{"model": model, "kind": "number", "scene": scene, "said": said} for model, scene, said in rows]
    assert rounding.as_first(["float32", "int8", "int4"], shares, wrong) == {"float32": 1.0, "int8": 0.9, "int4": 0.8}


# What has to be reached. The other ordinary questions may lose one point against the weights before these, which were
# asked about the same scenes.
AIMS = {"number": 0.97, "not there": 0.95, "second picture": 0.9, "wish, any order": 0.95}
AIMS |= {"print of 8 to 16 pixels": 0.9, "number across a border": 0.95}


def test_the_readme_says_what_was_reached():
    recorded, before = (json.loads((RESULTS / f"nano-{name}.json").read_text()) for name in ("0", "before"))
    for name in ("seed", "scenes"):
        assert recorded["conditions"][name] == before["conditions"][name]
    reached = {kind: share for part in ("exact", "varied") for kind, share in recorded[part]["with mining"].items()}
    old = before["exact"]["with mining"]
    aims = {kind: share - 0.01 for kind, share in old.items() if "never" not in kind} | AIMS
    rows = [
        f"| {kind} | {aim:.1%} | {f'{old[kind]:.1%}' if kind in old else ''} | {reached[kind]:.1%} |\n"
        for kind, aim in aims.items()
    ]
    readme = (ROOT / "recipes" / "nano" / "README.md").read_text(encoding="utf-8")
    assert "".join(rows) in readme, "".join(rows)
    # The README says why these were missed.
    assert {kind for kind, aim in aims.items() if reached[kind] < round(aim, 4)} == {"count", "describe", "draw"}
    # Neither the trial nor the older weights are these, and lessons were changed after a look at the trial's scenes.
    trial = json.loads((RESULTS / "nano-trial.json").read_text())
    assert recorded["conditions"]["seed"] != trial["conditions"]["seed"]
    weights = [result["conditions"]["sha256 of weights"]["with mining"] for result in (recorded, before)]
    assert weights[0] != weights[1]
    assert f"{recorded['conditions']['training']['with mining']['minutes']['all']} minutes" in " ".join(readme.split())


def test_the_table_of_rounding_shows_what_was_measured():
    exact = {"float32": {"number": 0.5, "count": 1.0}, "int8": {"number": 0.25, "count": 1.0}}
    exact |= {
        "asked": {"number": 4, "number, never seen": 1, "count": 12},
        "as float32": {"float32": 1.0, "int8": 0.75},
    }
    triton = {"float32": {"number": 1.0}, "float32, triton": {"number": 1.0}, "asked": {"number": 2}}
    triton |= {"as float32": {"float32": 1.0, "float32, triton": 0.5}}
    table = rounding.rounding_table({"exact": exact, "triton": {"exact": triton}}).splitlines()
    assert table[0] == "| weights and backend | number | ordinary scenes | as float32 | questions |"
    assert table[2:] == [
        "| float32 | 50.0% | 87.5% | 100.0% | 16 |",
        "| int8 | 25.0% | 81.2% | 75.0% | 16 |",
        "| float32, triton | 100.0% | 100.0% | 50.0% | 2 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["EMPTY", "--out", "FILE"], "expected a folder that recipes.nano.train wrote"),
        (["NANO", "--out", "FILE", "--count", "0"], "expected at least one scene"),
        (["NANO", "--out", "FILE", "--varied", "-1"], "no less than 0 further questions, got 500 and -1"),
        (["NANO", "--out", "NEW", "--backend", "triton"], "expected the result of the first command in"),
        (["NANO", "--out", "FILE", "--backend", "triton"], "expected the result of the first command in"),
    ],
)
def test_rounding_refuses_what_it_cannot_measure(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file.json").write_text("{}")
    places = {"EMPTY": tmp_path, "FILE": tmp_path / "file.json", "NEW": tmp_path / "new.json"}
    places["NANO"] = builtin.resolve("nano")
    monkeypatch.setattr("sys.argv", ["rounding", *(str(places.get(word, word)) for word in arguments)])
    with pytest.raises(SystemExit) as refused:
        rounding.main()
    assert refused.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_the_readme_says_what_was_right_in_training():
    recorded = json.loads((RESULTS / "nano-training.json").read_text())
    readme = (ROOT / "recipes" / "nano" / "README.md").read_text(encoding="utf-8")
    for stage, share in (("numbers", "page number"), ("everything", "answer")):
        for name in (stage, f"{stage} again"):
            assert f"{100 * recorded['stages'][name][share]:.1f} %" in readme, (name, share)
    for name in ("before wishes", "after wishes", "mean of both"):
        for kind in ("number", "wish, any order"):
            assert f"{100 * recorded['trials'][name][kind]:.1f}" in readme, (name, kind)
