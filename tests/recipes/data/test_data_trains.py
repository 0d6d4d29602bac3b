"""Dialogues that this recipe writes are samples of the fine-tuning recipe, and none of them is left out."""

import json

import pytest

from recipes.data import build
from recipes.data.journal import Journal, Reply
from recipes.data.sources import IN_CONTEXT, RECAPTION, Source, Sources
from tests.families import family
from tests.paths import ROOT

PROMPT = {"prompt": "red boat, calm lake, mist, dark pine trees, soft light"}
SOURCES = (
    Source(RECAPTION, "a.txt:1", caption="A red boat lies on a calm lake, with mist over the water."),
    Source(IN_CONTEXT, "b.json[0]", turns=(("Hi?", "Hello."), ("What grows in the shade?", "Ferns do."))),
)
REPLIES = (
    {"wish": "Show me a quiet red boat.", **PROMPT},
    {"prompt": "shady garden, ferns between old stones, moss, morning light"},
)


@pytest.mark.skipif(not (ROOT / "recipes" / "finetune").is_dir(), reason="this checkout has no recipes/finetune")
def test_dialogues_train(tmp_path, one_thread):
    from recipes.finetune.run import fine_tune
    from tests.recipes.finetuning import losses, make_config, skipped

    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        for source, reply in zip(SOURCES, REPLIES):
            journal.add(source.key, Reply(json.dumps(reply)))
        build.write(tmp_path, build.plan([Sources(SOURCES, ())]), journal, count_tokens=len)
    dialogues = json.loads((tmp_path / build.DIALOGUES).read_text())
    assert len(dialogues) == 2
    config = make_config(tmp_path / "training", family("standard").folder, dialogues, max_length=2048)
    fine_tune(config)
    assert len(losses(config)) == 2 and skipped(config) == {}
