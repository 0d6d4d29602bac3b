"""Reads the files from which the original's script asks TextVQA's questions."""

import json
import os
from pathlib import Path

from mg_fast.errors import MgFastError, quoted, shortened

# The environment variable that names the folder of the files.
FOLDER_VARIABLE = "MG_FAST_TEXTVQA"
QUESTIONS, ANSWERS, PICTURES = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json", "train_images"
TOKENS = "Reference OCR token:"


class QuestionFileError(MgFastError, ValueError):
    """Files of TextVQA that are missing or do not fit together."""


def folder() -> Path:
    """The folder that the environment variable `MG_FAST_TEXTVQA` names.

    Raises:
        QuestionFileError: it is not set, or one of the files is missing.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        raise QuestionFileError(
            f"expected the environment variable {FOLDER_VARIABLE} to name a folder with {QUESTIONS}, {ANSWERS} and "
            f"{PICTURES}/"
        )
    for name in (QUESTIONS, ANSWERS, PICTURES):
        if not (Path(named) / name).exists():
            raise QuestionFileError(f"{FOLDER_VARIABLE}: expected {name} in {shortened(named, 160)}, which has none")
    return Path(named)


def read_questions(path: str | Path) -> list[dict]:
    """The questions with what scores them.

    Args:
        path: the folder of the files.

    Returns:
        For each question `question_id` (the picture's), `text` as it is asked, reference OCR tokens included, `file`,
        the path of its picture, `answers`, those of ten people, and `answer`, the first of them.

    Raises:
        QuestionFileError: a file cannot be read, a line is no question, has no answers or no picture, there are no
            questions, or the file of answers is another one.
    """
    path = Path(path)
    annotations = _answers(path / ANSWERS)
    try:
        lines = (path / QUESTIONS).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionFileError(f"{QUESTIONS} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{QUESTIONS}, line {number}"
        try:
            asked = json.loads(line)
            picture, text, file = asked["question_id"], asked["text"], asked["image"]
            if not isinstance(picture, (str, int)) or not isinstance(text, str) or not isinstance(file, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise QuestionFileError(f"{where}: expected question_id, image and text, got {quoted(line)}") from None
        question = bare_question(text)
        answers = annotations.get((picture, question))
        if not answers:
            raise QuestionFileError(f"{where}: {ANSWERS} has no answers to {quoted(question)} about {quoted(picture)}")
        if not (path / PICTURES / file).is_file():
            raise QuestionFileError(f"{where}: {PICTURES} has no {quoted(file)}")
        rows.append(
            {
                "question_id": picture,
                "text": text,
                "file": str(path / PICTURES / file),
                "answers": list(answers),
                "answer": answers[0],
            }
        )
    if not rows:
        raise QuestionFileError(f"{QUESTIONS}: expected questions, and found none")
    return rows


def _answers(path: Path) -> dict[tuple, list[str]]:
    """The answers by the picture's name and the question in lower case."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["data"]
        return {(row["image_id"], row["question"].lower()): row["answers"] for row in rows}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise QuestionFileError(
            f'{path.name}: expected an object with rows under "data", each with image_id, question and answers'
        ) from None


def bare_question(text: str) -> str:
    """The question in a text of the question file, in lower case.

    A line of reference OCR tokens comes before or after it, and an instruction comes last.
    """
    first, _, rest = text.partition("\n")
    return (rest.partition("\n")[0] if first.startswith(TOKENS) else first).lower()
