"""The questions of nano's evaluation, for lmms-eval, which loads this file by its name in nano_scenes.yaml."""

import functools

import datasets
from lmms_eval.api.task import ConfigurableTask

from recipes.evaluate.tables import metric_name
from recipes.nano.evaluate import unseen_questions
from recipes.nano.scenes import draw_scene


class NanoScenes(ConfigurableTask):
    """Every unseen scene is asked one question of every type; an answer counts if it is right to the last character.

    The rows hold no pictures, because a scene is drawn again from its seed and number. Nothing is downloaded.
    """

    def __init__(self, config: dict | None = None, **options):
        # The class itself stands in the YAML file, and lmms-eval's configuration has no such field.
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"}, **options)

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """Makes the rows, in the place of the data set that other tasks download."""
        seed, count = self.config.metadata["seed"], self.config.metadata["count"]
        rows = [
            {
                "seed": seed,
                "scene": question.number,
                "kinds": question.kinds,
                "question": question.text,
                "answer": question.answer,
            }
            for question in unseen_questions(seed, 0, count)
        ]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def pictures(doc: dict) -> list:
    """The picture of a row's scene."""
    return [_picture(doc["seed"], doc["scene"])]


def right_or_wrong(doc: dict, results: list[str]) -> dict[str, float]:
    """1 or 0 for each of the kinds that a row counts for."""
    return {metric_name(kind): float(results[0] == doc["answer"]) for kind in doc["kinds"]}


@functools.lru_cache(maxsize=64)
def _picture(seed: int, number: int):
    return draw_scene(seed, number, split="unseen").image
