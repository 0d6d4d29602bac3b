"""The scores that the original reports, the tasks that measure them here, and tables of both."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the original's table.

    Attributes:
        title: its name there.
        task: the task of lmms-eval, or one in `recipes/evaluate/tasks`.
        metrics: the task's metrics that make the score, in order.
        scale: what a metric is multiplied by.
        judge: whether a hosted model scores the answers.
    """

    title: str
    task: str
    metrics: tuple[str, ...]
    scale: float = 1.0
    judge: bool = False


# By the names that the command line takes.
BENCHMARKS: Mapping[str, Benchmark] = {
    "textvqa": Benchmark("TextVQA", "textvqa_val_reference_tokens", ("exact_match",), scale=100.0),
    "mmb": Benchmark("MMB", "mmbench_en_dev", ("gpt_eval_score",), judge=True),
    "mme": Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score")),
    "mmvet": Benchmark("MM-Vet", "mmvet_plain", ("gpt_eval_score",), judge=True),
    "mmmu": Benchmark("MMMU val", "mmmu_val", ("mmmu_acc",), scale=100.0),
    # The answers of its test split are not public: lmms-eval writes a file to upload, and no score.
    "mmmu_test": Benchmark("MMMU test", "mmmu_test_short", ("submission",)),
    "mathvista": Benchmark("MathVista", "mathvista_short", ("llm_as_judge_eval",), judge=True),
}
NONE = "-"
# The scores in the original's README, in the order of BENCHMARKS; None where it has none.
ORIGINAL: Mapping[str, tuple[str | None, ...]] = {
    "2B": ("56.2", "59.8", "1341/312", "31.1", "31.7", "29.1", "29.4"),
    "7B": ("65.2", "69.3", "1523/316", "40.8", "36.1", "32.8", "31.4"),
    "13B": ("65.9", "68.5", "1565/322", "46.0", "38.1", "33.5", "37.0"),
    "8B": ("67.6", "72.7", "1606/341", "47.3", "38.2", "36.3", None),
    "8x7B": ("69.2", "75.6", "1639/379", "45.8", "41.8", "37.1", "41.8"),
    "34B": ("70.1", "79.6", "1666/439", "53.0", "48.7", "43.6", "38.9"),
    "7B-HD": ("68.4", "65.8", "1546/319", "41.3", "36.8", "32.9", "32.2"),
    "13B-HD": ("70.2", "68.6", "1597/320", "50.5", "37.3", "35.1", "37.0"),
    "8B-HD": ("71.6", None, "1532/357", None, "37.0", None, None),
    "8x7B-HD": ("71.9", "74.7", "1633/356", "53.5", "40.0", "37.0", "43.1"),
    "34B-HD": ("74.1", "80.6", "1659/482", "59.3", "48.0", "44.9", "43.3"),
}


def metric_name(kind: str) -> str:
    """The name of a metric of nano's task for a kind of question, without the characters that lmms-eval splits at."""
    return kind.replace(", ", "_").replace(" ", "_")


def original_table() -> str:
    """The Markdown table of the original's scores, with an empty column for those of mg_fast beside each."""
    titles = [benchmark.title for benchmark in BENCHMARKS.values()]
    rows = [f"| model | {' | '.join(f'{title} | mg_fast' for title in titles)} |", f"|---|{'---|---|' * len(titles)}"]
    for model, scores in ORIGINAL.items():
        # Each score is followed by an empty cell.
        cells = [cell for one in scores for cell in (one or NONE, "")]
        rows.append(f"| {' | '.join([model, *cells])} |")
    return "\n".join(rows) + "\n"


def score(benchmark: Benchmark, results: Mapping[str, Mapping]) -> str | None:
    """The score of a benchmark as the original writes it, from lmms-eval's results by task; None if there is none."""
    found = results.get(benchmark.task, {})
    # The names of metrics end with that of a filter.
    values = {name.split(",")[0]: value for name, value in found.items()}
    parts = [values.get(metric) for metric in benchmark.metrics]
    if not all(isinstance(part, (int, float)) for part in parts):
        return None
    digits = 0 if len(parts) > 1 else 1
    return "/".join(f"{part * benchmark.scale:.{digits}f}" for part in parts)


def comparison(model: str | None, results: Mapping[str, Mapping], *, limit: float | None = None) -> str:
    """The Markdown table of the benchmarks that were run, beside the original's scores for a model of its table.

    Args:
        model: the name of the model in the original's table; None where there is none.
        results: lmms-eval's results by task.
        limit: lmms-eval's `--limit`: the number or, below 1, the share of the questions that were asked; None for all.
    """
    known = dict(zip(BENCHMARKS, ORIGINAL.get(model or "", (None,) * len(BENCHMARKS))))
    part = "" if limit is None else f", --limit {limit:g}"
    rows = [f"| benchmark | original | mg_fast{part} |", "|---|---|---|"]
    for name, benchmark in BENCHMARKS.items():
        if (found := score(benchmark, results)) is not None:
            rows.append(f"| {benchmark.title} | {known[name] or NONE} | {found} |")
    if len(rows) == 2:
        return ""
    if part:
        rows += ["", "Only some of the questions were asked, so these are not the scores of the benchmarks."]
    return "\n".join(rows) + "\n"
