"""lmms-eval runs mg_fast and this project's tasks without a network, with the figures of nano's own evaluation."""

import copy
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from PIL import Image

import mg_fast
from mg_fast.integrations import lmms_eval as integration
from recipes.evaluate.__main__ import TASKS
from recipes.evaluate.tables import BENCHMARKS, metric_name
from recipes.evaluate.textvqa import ANSWERS, PICTURES, QUESTIONS
from recipes.nano.evaluate import evaluate, unseen_questions
from recipes.nano.model import forget_mined
from recipes.nano.scenes import draw_scene
from tests.paths import ROOT

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: `make eval-test` installs it"
    ),
    pytest.mark.usefixtures("one_thread"),
]
SEED, SCENES = 7000, 6
# lmms-eval scores with this many threads.
THREADS = {"process_docs_parallel": 2}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Fails where anything is asked of another machine."""

    def refuse(self, address, *_):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def pipelines():
    """Nano, and the same model blinded, which errs often."""
    seeing = mg_fast.load("nano", dtype="float32")
    blind = copy.deepcopy(seeing.model)
    forget_mined(blind)
    return {"seeing": seeing, "blind": mg_fast.Pipeline(blind, seeing.processor)}


@pytest.fixture(scope="module")
def manager():
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS))


def run(model, task, manager):
    """The results of a task and its samples."""
    from lmms_eval.evaluator import simple_evaluate

    options = {"task_manager": manager, "log_samples": True, "bootstrap_iters": 0, **THREADS}
    found = simple_evaluate(model=model, tasks=[task], **options)
    [name] = found["results"]
    return found["results"][name], found["samples"][name]


def scenes(manager) -> dict:
    """The configuration of nano's task with a few scenes."""
    metadata = {"version": 1.0, "seed": SEED, "count": SCENES}
    return {"task": "nano_scenes", "metadata": metadata}


def test_the_figures_are_those_of_nanos_own_evaluation(pipelines, manager):
    shares, wrong = evaluate(pipelines, seed=SEED, count=SCENES)
    asked = shares.pop("asked")
    for name, pipeline in pipelines.items():
        results, samples = run(integration.LmmsEvalModel(pipeline, batch_size=16), scenes(manager), manager)
        assert {kind: round(results[f"{metric_name(kind)},none"], 4) for kind in asked} == shares[name]
        found = [
            {"asked": sample["doc"]["question"], "said": sample["filtered_resps"][0], "right": sample["target"]}
            for sample in samples
            if sample["filtered_resps"][0] != sample["target"]
        ]
        own = [{key: row[key] for key in ("asked", "said", "right")} for row in wrong if row["model"] == name]
        # Both go through the scenes in order.
        assert found == own
        for kind, count in asked.items():
            assert sum(metric_name(kind) in sample for sample in samples) == count
    # Nano errs nowhere or seldom, and blinded it does not err everywhere: so every figure could be another one.
    assert any(0 < share < 1 for share in shares["blind"].values())
    assert shares["blind"]["number"] < shares["seeing"]["number"]


def test_the_rows_are_the_questions_of_the_evaluation(manager):
    from lmms_eval.tasks import get_task_dict

    [task] = get_task_dict([scenes(manager)], manager).values()
    expected = list(unseen_questions(SEED, 0, SCENES))
    rows = task.dataset["test"]
    assert [(row["question"], row["answer"], row["kinds"]) for row in rows] == [
        (one.text, one.answer, one.kinds) for one in expected
    ]
    for row, one in zip(rows, expected):
        [picture] = task.doc_to_visual(row)
        assert picture.tobytes() == one.scene.image.tobytes()


def test_lmms_eval_finds_the_model_by_its_entry_point():
    from lmms_eval.api.model import lmms
    from lmms_eval.models import get_model

    kind = get_model("mg_fast")
    assert kind is integration.LmmsEvalModel and issubclass(kind, lmms) and kind.is_simple


def test_the_model_is_loaded_from_arguments_and_dropped_after_its_questions():
    kind = integration.LmmsEvalModel
    model = kind.create_from_arg_string("pretrained=nano,dtype=float32", {"batch_size": "2", "device": "cpu"})
    assert model.batch_size == 2 and str(model.device) == "cpu" and (model.rank, model.world_size) == (0, 1)
    model.clean()
    with pytest.raises(mg_fast.BackendError, match="was dropped"):
        model.pipeline  # noqa: B018


def test_a_pipeline_of_the_caller_stays(pipelines):
    model = integration.LmmsEvalModel(pipelines["seeing"])
    model.clean()
    assert model.pipeline is pipelines["seeing"]


def rows_of(name: str, picture) -> list[dict]:
    """Rows with the columns of a benchmark's data set, about one picture."""
    if name == "textvqa":
        asked = {"question_id": 7, "question": "what does the sign say?", "ocr_tokens": ["42"]}
        return [{**asked, "answers": ["42"] * 10, "image": picture}]
    if name == "mmb":
        asked = {"index": 1, "question": "What is it?", "A": "a sign", "B": "a cat", "C": "nan", "D": "nan"}
        about = {"hint": "nan", "category": "ocr", "L2-category": "finegrained", "source": "s", "split": "dev"}
        return [{**asked, **about, "answer": "A", "image": picture}]
    if name == "mme":
        about = {"question_id": "q1", "category": "OCR", "image": picture}
        asked = {"Is there a sign?": "Yes", "Is there a cat?": "No"}
        return [{**about, "question": f"{q} Please answer yes or no.", "answer": a} for q, a in asked.items()]
    if name == "mmvet":
        asked = {"question_id": "v1", "question": "What does it say?", "capability": "ocr"}
        return [{**asked, "answer": "42", "image": picture}]
    if name in ("mmmu", "mmmu_test"):
        asked = {"id": "validation_Art_1", "question": "Is <image 1> like <image 2>?", "options": "['yes', 'no']"}
        return [{**asked, "question_type": "multiple-choice", "answer": "A", "image_1": picture, "image_2": picture}]
    asked = {"pid": "1", "question": "How many?", "query": "How many?", "choices": ["1", "2"], "caption": "", "ocr": ""}
    about = {"question_type": "multi_choice", "answer_type": "text", "unit": "", "precision": 0.0}
    return [{**asked, **about, "answer": "2", "decoded_image": picture}]


# What each benchmark asks about the rows above, in parts. MMMU's two pictures come first, and stay named in the text.
ASKED = {
    "textvqa": ["What does the sign say?\nReference OCR token: 42\nAnswer the question using a single word or phrase."],
    "mmb": ["What is it? There are several options:\nA. a sign\nB. a cat\n\nAnswer with the option's letter"],
    "mme": [
        "Is there a sign?\nAnswer the question using a single word or phrase.",
        "Is there a cat?\nAnswer the question using a single word or phrase.",
    ],
    "mmvet": ["What does it say?"],
    "mmmu": ["Is <image 1> like <image 2>?\nA. yes\nB. no\n\nAnswer with the option's letter"],
    "mmmu_test": ["Is <image 1> like <image 2>?\nA. yes\nB. no\n\nAnswer with the option's letter"],
    "mathvista": ["How many?"],
}


@pytest.mark.parametrize("name", ASKED)
def test_the_benchmarks_ask_mg_fast(pipelines, manager, tmp_path, monkeypatch, name):
    """The tasks' own functions make the questions of rows that are made here; the data sets are not needed."""
    import datasets
    from lmms_eval.tasks import get_task_dict

    # Some tasks make the client of their judge when they are imported.
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    picture = draw_scene(SEED, 0, split="unseen").image
    rows, benchmark = rows_of(name, picture), BENCHMARKS[name]
    split = manager_split(manager, benchmark.task)
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "rows")
    local = {"dataset_path": str(tmp_path / "rows"), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}
    [task] = get_task_dict([{"task": benchmark.task, **local}], manager).values()
    task.build_all_requests()
    model = integration.LmmsEvalModel(pipelines["seeing"], batch_size=4, strict=True)
    model.task_dict[task.config.task] = task.dataset
    asked = []
    monkeypatch.setattr(integration, "question", recording(integration.question, asked))
    answers = model.generate_until(task.instances)
    # An answer that could not be given would be an error here.
    assert len(answers) == len(rows) == len(asked)
    for one, part in zip(asked, ASKED[name]):
        assert part in one["text"] and [found.tobytes() for found in one["images"]] == [picture.tobytes()] * (
            2 if name in ("mmmu", "mmmu_test") else 1
        )


def manager_split(manager, task: str) -> str:
    """The split of a task's data set that is asked about."""
    return configuration(manager, task)["test_split"]


def configuration(manager, task: str) -> dict:
    """What the file of a task says."""
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(manager.task_index[task]["yaml_path"], mode="simple")


def recording(function, calls: list):
    """The function, whose results are also kept in a list."""

    def call(*arguments):
        calls.append(function(*arguments))
        return calls[-1]

    return call


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_task_with_the_metrics_that_are_read(manager, name):
    benchmark = BENCHMARKS[name]
    assert benchmark.task in manager.all_subtasks
    config = configuration(manager, benchmark.task)
    assert set(benchmark.metrics) <= {metric["metric"] for metric in config["metric_list"]}


def test_the_page_says_how_many_tokens_an_answer_may_have(manager):
    """The last column where it names a number, as the task then differs, and otherwise that of the original."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.partition("### How each benchmark")[2].partition("|---|")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()[1:]]
    said = {}
    for _, task, original, differs in rows:
        found = re.search(r"(\d+) tokens", differs) or re.search(r"(\d+) tokens", original)
        said[task.strip("`")] = int(found.group(1))
    assert set(said) == {benchmark.task for benchmark in BENCHMARKS.values()} | {"textvqa_question_file"}
    for task, tokens in said.items():
        options = configuration(manager, task)["generation_kwargs"]
        assert integration.answer_options(options)[0]["max_new_tokens"] == tokens, task


@pytest.mark.parametrize("tokens", [["DAKOTA", "DIGITAL"], []])
def test_textvqa_asks_with_reference_tokens_as_the_question_file_does(manager, tokens):
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(manager.task_index["textvqa_val_reference_tokens"]["yaml_path"], mode="full")
    text = config["doc_to_text"](
        {"question": "what is the brand?", "ocr_tokens": tokens}, config["lmms_eval_specific_kwargs"]["default"]
    )
    assert text == (
        f"What is the brand?\nReference OCR token: {', '.join(tokens)}\n"
        "Answer the question using a single word or phrase."
    )


def test_textvqa_from_the_originals_files(pipelines, manager, tmp_path, monkeypatch):
    text = "What does the sign say?\nReference OCR token: 42\nAnswer the question using a single word or phrase."
    rows = [{"question_id": f"p{i}", "image": f"p{i}.png", "text": text} for i in range(2)]
    (tmp_path / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / PICTURES).mkdir()
    said = []
    for i, row in enumerate(rows):
        picture = Image.new("RGB", (192, 192), ("red", "blue")[i])
        picture.save(tmp_path / PICTURES / row["image"])
        said.append(pipelines["seeing"].conversation().chat(text, [picture], max_new_tokens=128).text)
    # Three of ten people say what nano says about the first picture: with one of them left out at a time, the others
    # are three in seven cases and two in three cases.
    answers = [[said[0]] * 3 + ["other"] * 7, ["other"] * 10]
    data = [
        {"image_id": row["question_id"], "question": "what does the sign say?", "answers": answers[i]}
        for i, row in enumerate(rows)
    ]
    (tmp_path / ANSWERS).write_text(json.dumps({"data": data}))
    monkeypatch.setenv("MG_FAST_TEXTVQA", str(tmp_path))
    results, samples = run(integration.LmmsEvalModel(pipelines["seeing"]), "textvqa_question_file", manager)
    assert [sample["filtered_resps"][0] for sample in samples] == said
    assert results["exact_match,none"] == pytest.approx((7 * 1 + 3 * 2 / 3) / 10 / 2)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    words = ["--model", "nano", "--dtype", "float32", "--device", "cpu", "--tasks", "nano_scenes"]
    command = [sys.executable, "-m", "recipes.evaluate", *words, "--out", str(tmp_path), "--", "--limit", "9"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [file] = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())["results"]["nano_scenes"]
    assert results["background,none"] == 1.0 and str(file) in done.stdout
