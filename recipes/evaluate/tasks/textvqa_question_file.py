"""TextVQA from the original's own files, for lmms-eval, which loads this file by its name in the YAML file."""

import datasets
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks.textvqa.utils import textvqa_process_results

from mg_fast.models.pictures import open_picture
from recipes.evaluate.textvqa import folder, read_questions


class QuestionFile(ConfigurableTask):
    """The questions with the reference OCR tokens that the original's question file gives them.

    Raises:
        QuestionFileError: the files are not where `MG_FAST_TEXTVQA` says, or do not fit together.
    """

    def __init__(self, config: dict | None = None, **options):
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"}, **options)

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """Reads the files, in the place of the data set that other tasks download."""
        rows = read_questions(folder())
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def pictures(doc: dict) -> list:
    """The picture of a row."""
    return [open_picture(doc["file"])]


def accuracy(doc: dict, results: list[str]) -> dict[str, float]:
    """The share of people who gave the same answer, as TextVQA counts it."""
    return {"exact_match": textvqa_process_results(doc, results)["exact_match"]}
