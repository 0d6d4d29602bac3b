"""The runner of benchmarks: its command, its tables, and TextVQA's question file. lmms-eval is not needed."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from recipes.evaluate import __main__ as evaluate
from recipes.evaluate.__main__ import MISSING, STALE, TASKS, main
from recipes.evaluate.tables import BENCHMARKS, ORIGINAL, comparison, metric_name, original_table, score
from recipes.evaluate.textvqa import (
    ANSWERS,
    PICTURES,
    QUESTIONS,
    QuestionFileError,
    bare_question,
    folder,
    read_questions,
)
from recipes.nano.evaluate import KINDS
from tests.paths import ROOT


def dry_run(capsys, *words) -> dict[str, str]:
    """The options of lmms-eval's command for the words of ours."""
    main(["--dry-run", *words])
    command = shlex.split(capsys.readouterr().out)
    assert command[:3] == [sys.executable, "-m", "lmms_eval"]
    return {name: value for name, value in zip(command[3:], command[4:]) if name.startswith("--")}


def test_the_command(capsys):
    options = dry_run(
        capsys, "--model", "nano", "--benchmarks", "textvqa", "mme", "--tasks", "nano_scenes", "--device", "cpu"
    )
    assert options["--model"] == "mg_fast" and options["--model_args"] == "pretrained=nano,dtype=auto"
    assert options["--tasks"] == "textvqa_val_reference_tokens,mme,nano_scenes" and options["--device"] == "cpu"
    assert options["--batch_size"] == "16" and options["--include_path"] == str(TASKS) and TASKS.is_dir()
    options = dry_run(
        capsys, "--model", "m", "--benchmarks", "all", "--", "--limit", "8", "--gen_kwargs", "num_beams=5"
    )
    assert options["--tasks"].split(",") == [benchmark.task for benchmark in BENCHMARKS.values()]
    assert options["--limit"] == "8" and options["--gen_kwargs"] == "num_beams=5"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "nano"], "got neither"),
        (["--model", "nano", "--benchmarks", "vqa"], "invalid choice: 'vqa'"),
        (["--model", "a,b", "--benchmarks", "mme"], "without a comma, got a,b"),
    ],
)
def test_wrong_command_lines(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_it_says_where_lmms_eval_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nano", "--tasks", "nano_scenes", "--out", str(tmp_path)])
    assert ended.value.code == 1 and MISSING in capsys.readouterr().err


def test_it_says_where_an_earlier_state_is_installed(capsys, monkeypatch, tmp_path):
    """What was installed before there was an entry point lies first in the path, as a folder in the checkout."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("lmms-eval was called"))
    monkeypatch.setattr("recipes.evaluate.__main__.ROOT", tmp_path)
    stale = tmp_path / "mg_fast.egg-info"
    stale.mkdir()
    (stale / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: mg_fast\nVersion: 0\n")
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nano", "--tasks", "nano_scenes", "--out", str(tmp_path)])
    assert ended.value.code == 1 and STALE in capsys.readouterr().err


@pytest.mark.parametrize("limit, mark", [(None, "| mg_fast |"), (8.0, "| mg_fast, --limit 8 |")])
def test_what_comes_back(capsys, monkeypatch, tmp_path, limit, mark):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("recipes.evaluate.__main__.ROOT", tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    installed = tmp_path / "mg_fast.egg-info"
    installed.mkdir()
    (installed / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: mg_fast\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(
        "[lmms_eval.models]\nmg_fast = mg_fast.integrations.lmms_eval:manifest\n"
    )

    def write(command, env):
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
        found = {"results": {"mmbench_en_dev": {"gpt_eval_score,none": 69.31}}, "config": {"limit": limit}}
        (tmp_path / "1_results.json").write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("subprocess.run", write)
    main(["--model", "m", "--benchmarks", "mme", "mmb", "--published", "7B", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert mark in printed.out and "| MMB | 69.3 | 69.3 |" in printed.out
    assert ("Only some of the questions were asked" in printed.out) == (limit is not None)
    assert "scores the answers of mmb, and OPENAI_API_KEY is not set" in printed.err


def test_help_needs_nothing_that_is_optional():
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'lmms_eval', 'datasets'): sys.modules[name] = None\n"
        "import runpy\nsys.argv = ['', '--help']\nrunpy.run_module('recipes.evaluate', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0 and "--benchmarks" in done.stdout, done.stderr


# ---- tables


def test_the_page_has_the_table_of_the_original():
    assert original_table() in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(len(scores) == len(BENCHMARKS) for scores in ORIGINAL.values())
    assert original_table().count("\n") == 2 + 11 and "| 7B-HD | 68.4 |  | 65.8 |  | 1546/319 |  |" in original_table()


def test_scores_are_written_as_the_original_writes_them():
    results = {
        "mme": {"alias": "mme", "mme_perception_score,none": 1523.4, "mme_cognition_score,none": 316.07},
        "textvqa_val_reference_tokens": {"exact_match,none": 0.6518, "exact_match_stderr,none": 0.01},
        "mmbench_en_dev": {"gpt_eval_score,none": 69.31, "submission,none": None},
        "mmmu_test": {"submission,none": None},
    }
    found = {name: score(benchmark, results) for name, benchmark in BENCHMARKS.items()}
    assert found["mme"] == "1523/316" and found["textvqa"] == "65.2" and found["mmb"] == "69.3"
    assert found["mmmu_test"] is None and found["mmvet"] is None
    table = comparison("7B", results)
    assert "| TextVQA | 65.2 | 65.2 |\n| MMB | 69.3 | 69.3 |\n| MME | 1523/316 | 1523/316 |\n" in table
    assert "| TextVQA | - | 65.2 |" in comparison(None, results) and comparison("7B", {}) == ""


def test_the_help_names_the_benchmarks_that_a_hosted_model_scores():
    judged = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.judge)
    assert f"answers a hosted model scores ({judged})" in evaluate.__doc__


def test_the_names_of_nanos_metrics():
    text = (TASKS / "nano_scenes.yaml").read_text(encoding="utf-8")
    for kind in KINDS:
        assert "," not in metric_name(kind) and f"{{metric: {metric_name(kind)}, aggregation: mean" in text


# ---- TextVQA


@pytest.fixture
def files(tmp_path):
    """The three files of the original's script, with two questions about one picture and one about another."""
    asked = [
        (
            "p1",
            "What is the brand?\nReference OCR token: NOUS, PRO\nAnswer the question using a single word or phrase.",
        ),
        ("p1", "What colour is it?\nAnswer the question using a single word or phrase."),
        ("p2", "Reference OCR token: 7\nWhat NUMBER is it?\nAnswer the question using a single word or phrase."),
    ]
    rows = [{"question_id": name, "image": f"{name}.jpg", "text": text, "category": "default"} for name, text in asked]
    (tmp_path / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        {"image_id": "p1", "question": "what is the brand?", "answers": ["dakota"] * 9 + ["nous"]},
        {"image_id": "p1", "question": "What colour is it?", "answers": ["grey"] * 10},
        {"image_id": "p2", "question": "what number is it?", "answers": ["7"] * 10},
    ]
    (tmp_path / ANSWERS).write_text(json.dumps({"data": data}))
    (tmp_path / PICTURES).mkdir()
    for name in ("p1.jpg", "p2.jpg"):
        (tmp_path / PICTURES / name).touch()
    return tmp_path


def test_questions_are_asked_word_for_word(files):
    rows = read_questions(files)
    lines = [json.loads(line) for line in (files / QUESTIONS).read_text().splitlines()]
    assert [row["text"] for row in rows] == [line["text"] for line in lines]
    assert [row["answer"] for row in rows] == ["dakota", "grey", "7"] and len(rows[0]["answers"]) == 10
    assert rows[2]["file"] == str(files / PICTURES / "p2.jpg") and rows[2]["question_id"] == "p2"


def test_questions_without_tokens_or_with_empty_ones():
    assert bare_question("Why?\nReference OCR token: \nAnswer.") == "why?" == bare_question("Why?\nAnswer.")


def test_files_that_do_not_fit(files, monkeypatch):
    monkeypatch.delenv("MG_FAST_TEXTVQA", raising=False)
    with pytest.raises(QuestionFileError, match="MG_FAST_TEXTVQA to name a folder"):
        folder()
    monkeypatch.setenv("MG_FAST_TEXTVQA", str(files))
    assert folder() == files
    (files / PICTURES / "p2.jpg").unlink()
    with pytest.raises(QuestionFileError, match="line 3: train_images has no 'p2.jpg'"):
        read_questions(files)
    (files / ANSWERS).write_text(json.dumps({"questions": []}))
    with pytest.raises(QuestionFileError, match=f'{ANSWERS}: expected an object with rows under "data"'):
        read_questions(files)
    (files / ANSWERS).write_text(json.dumps({"data": []}))
    with pytest.raises(QuestionFileError, match="line 1: .* has no answers to 'what is the brand"):
        read_questions(files)
    whole = {"question_id": 1, "text": "Why?", "image": "a.jpg"}
    for change in ({"text": 7}, {"image": None}, {"question_id": ["p1"]}, {"question_id": {}}):
        (files / QUESTIONS).write_text(json.dumps({**whole, **change}))
        with pytest.raises(QuestionFileError, match="line 1: expected question_id, image and text"):
            read_questions(files)
    for broken in ('{"question_id": 1}\n', "9" * 5000, "[" * 200_000):
        (files / QUESTIONS).write_text(broken)
        with pytest.raises(QuestionFileError, match="line 1: expected question_id, image and text"):
            read_questions(files)
    (files / QUESTIONS).write_bytes("{}".encode("utf-16"))
    with pytest.raises(QuestionFileError, match="cannot be read: .*utf-8"):
        read_questions(files)
    (files / QUESTIONS).write_text("\n")
    with pytest.raises(QuestionFileError, match="expected questions, and found none"):
        read_questions(files)
    (files / ANSWERS).unlink()
    with pytest.raises(QuestionFileError, match=f"expected {ANSWERS} in"):
        folder()
