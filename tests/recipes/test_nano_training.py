"""A training run of nano: what its stages learn, how it goes on where it stopped, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mg_fast import MiniGeminiForConditionalGeneration, Pipeline
from mg_fast.models import builtin
from recipes.nano import data, train
from recipes.nano import evaluate as evaluation
from recipes.nano.evaluate import evaluate
from recipes.nano.losses import chat_loss
from recipes.nano.model import LR_SIDE, make_model
from recipes.nano.optimizers import make_optimizers
from recipes.nano.scenes import (
    SIDE,
)
from recipes.nano.stages import BRIDGE, FACTS, STAGES, TrainingStage
from tests.paths import ROOT

# Steps, pictures and rate of stages. They are enough to see the longer stages learn.
LESSONS = dict(digits=(3, 2, 1e-3), lookup=(10, 4, 5e-3), scenes=(8, 2, 1e-3))


@pytest.mark.slow
def test_training_learns_and_goes_on_where_it_stopped(tmp_path):
    short = [(stage, LESSONS.get(stage.name, (1, 2, 1e-3))) for stage in STAGES]
    stages = tuple(
        dataclasses.replace(stage, **dict(zip(("steps", "batch", "rate"), lesson))) for stage, lesson in short
    )

    def run(stages=stages) -> train.Run:
        return train.Run(tmp_path / "run", seed=0, hr=True, stages=stages, workers=0)

    assert not run(stages[:-1]).train(minutes=0)
    # Nothing is there that could be taken for a trained checkpoint.
    assert not (tmp_path / "run" / "model").exists()
    # The log of a killed run reaches beyond its saved state and may end in half a line.
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"stage": "digits", "step": 2, "loss"')
    # Stages that have not begun may be other ones than before.
    resumed = run()
    assert (resumed.at, resumed.step) == (0, 1)
    before = {name: p.detach().clone() for name, p in resumed.model.named_parameters()}
    assert resumed.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(s.name, i + 1) for s in stages for i in range(s.steps)]
    for name in ("lookup", "scenes"):
        # The losses compare the same batch at the stage's first step and after all stages.
        first = next(row["loss"] for row in rows if row["stage"] == name)
        stage = next(stage for stage in stages if stage.name == name)
        with torch.no_grad():
            loss, _ = resumed._loss(stage, resumed._batch(stage, 0))
        assert loss < 0.8 * first, name
    for part in ("vision_tower.", "vision_tower_aux.", "patch_mining.", "mm_projector.", "language_model."):
        assert any(
            not torch.equal(p, before[name]) for name, p in resumed.model.named_parameters() if f".{part}" in name
        ), part

    record = (tmp_path / "run" / "model" / "training.json").read_text()
    assert {name: json.loads(record)[name] for name in ("seed", "hr", "device", "starts")} == dict(
        seed=0, hr=True, device="cpu", starts=2
    )
    assert list(json.loads(record)["minutes"]) == [*(stage.name for stage in stages), "all"]
    # A finished run stays as it was.
    done = run()
    assert done.at == len(stages) and done.train()
    assert (tmp_path / "run" / "model" / "training.json").read_text() == record

    train.draw_curve(tmp_path / "run" / "log.jsonl", tmp_path / "loss.png")
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 10

    # But a finished run goes on if it is given a further stage.
    more = (*stages, dataclasses.replace(stages[-1], name="digits", steps=2, learns=("vision_tower_aux",)))
    assert not run(more).train(minutes=0)
    # What it wrote when it was finished is not its result any more.
    assert not (tmp_path / "run" / "model" / "training.json").exists()
    further = run(more)
    assert (further.at, further.step) == (len(stages), 1) and further.train() and further.record()["starts"] == 4
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["stage"] == "digits"

    written = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for other, name in (dict(seed=1), "seed"), (dict(hr=False), "hr"), (dict(stages=stages[:-1]), "stages"):
        with pytest.raises(SystemExit, match=f"holds a run of other {name}"):
            train.Run(tmp_path / "run", **{"seed": 0, "hr": True, "stages": stages, "workers": 0, **other})
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == written

    loaded = MiniGeminiForConditionalGeneration.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).eval()
    trained = dict(further.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, trained[name], atol=2e-3, rtol=1e-3)
    shares, wrong = evaluate({"nano": Pipeline(loaded, further.processor)}, seed=0, count=3)
    assert shares["asked"]["describe"] == 3 and set(shares["nano"]) == set(shares["asked"])
    assert len(wrong) == sum(
        round(n * (1 - shares["nano"][kind])) for kind, n in shares["asked"].items() if "never" not in kind
    )


def test_the_second_round_of_a_lesson_has_other_scenes(tmp_path):
    run = train.Run(tmp_path, seed=0, hr=True, stages=STAGES, workers=0)
    again = [stage for stage in STAGES if stage.again]
    assert [stage.lesson for stage in again] == ["numbers", "scenes", "everything"]
    for stage in again:
        first = next(other for other in STAGES if other.name == stage.lesson)
        batches = [run._batch(dataclasses.replace(one, batch=4), 0) for one in (first, stage)]
        one, two = (batch.get("page", batch)["pixels"] for batch in batches)
        assert batches[0].keys() == batches[1].keys() and (one.shape != two.shape or not torch.equal(one, two))
        assert run._seed(first) != run._seed(stage)


@pytest.mark.slow
def test_a_run_without_the_branch_takes_over_the_language_model(tmp_path):
    """It ends as a run that learned language itself, because those stages do not see the branch."""
    lessons = {"lookup", "pairs", "digits", "scenes", "everything"}
    stages = tuple(dataclasses.replace(stage, steps=2, batch=2) for stage in STAGES if stage.name in lessons)

    def run(folder, **options) -> train.Run:
        return train.Run(tmp_path / folder, seed=0, stages=stages, workers=0, **{"hr": False, **options})

    with pytest.raises(SystemExit, match="with holds no language.safetensors: its run has not ended the stages"):
        run("early", language=tmp_path / "with")
    other = run("with", hr=True)
    assert other.train()
    whole, short = run("whole"), run("short", language=tmp_path / "with")
    assert (short.at, short.shared) == (2, ["lookup", "pairs"]) and whole.train() and short.train()
    for one, two in zip(whole.model.state_dict().values(), short.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    # A process that was killed before it wrote the file writes it when it goes on.
    (tmp_path / "with" / train.LANGUAGE).unlink()
    late = run("with", hr=True)
    late.at = 2
    late.train()
    assert (tmp_path / "with" / train.LANGUAGE).is_file()
    assert short.record()["taken over"] == ["lookup", "pairs"] and list(short.record()["minutes"]) == [
        *("lookup", "pairs", "scenes", "everything", "all")
    ]
    # The state of a run that goes on says so, too.
    assert run("short").shared == ["lookup", "pairs"] and whole.record()["taken over"] == []
    with pytest.raises(SystemExit, match="whole holds a run that learns language itself: give another folder"):
        run("whole", language=tmp_path / "with")
    with pytest.raises(SystemExit, match="holds a run of other seed"):
        train.Run(tmp_path / "seed", seed=1, hr=False, stages=stages, workers=0, language=tmp_path / "with")


def test_the_committed_language_model_is_of_these_stages(tmp_path):
    """So a run can begin with the picture side."""
    run = train.Run(
        tmp_path, seed=0, hr=True, stages=STAGES, workers=0, language=ROOT / "recipes" / "nano" / "language"
    )
    assert run.shared == ["lookup", "pairs", "search", "language"] and run.stages[run.at].name == "digits"
    assert run.seconds > 600 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 1750
    # A batch that training never drew.
    batch = run._batch(run.stages[0], run.stages[0].steps)
    loss, shares = run._loss(run.stages[0], batch)
    # It has learned what the first stage teaches.
    assert shares["digit"] > 0.8 and shares["place"] > 0.9


@pytest.mark.slow
def test_the_stage_of_wishes_ends_with_the_mean_of_before_and_after(tmp_path, monkeypatch):
    [wishes] = (stage for stage in STAGES if stage.name == "wishes")
    assert wishes == STAGES[-1] and wishes.name in train.AVERAGED
    stages = (dataclasses.replace(wishes, steps=2, batch=2),)

    def run(folder: str) -> train.Run:
        return train.Run(tmp_path / folder, seed=0, hr=True, stages=stages, workers=0)

    began = {name: p.detach().clone() for name, p in run("cut").model.named_parameters()}
    assert not run("cut").train(minutes=0)
    cut = run("cut")
    assert cut.step == 1 and cut.train() and run("cut").before == {}
    monkeypatch.setattr(train, "AVERAGED", ())
    plain = run("plain")
    assert plain.train()
    ends = dict(plain.model.named_parameters())
    moved = [name for name in began if not torch.equal(began[name], ends[name])]
    assert moved and all("language_model" in name for name in moved)
    for name, parameter in cut.model.named_parameters():
        torch.testing.assert_close(parameter, (began[name] + ends[name]) / 2)


def test_what_a_run_took_is_told_by_stage(tmp_path):
    run = train.Run(tmp_path, seed=3, hr=False, stages=STAGES, workers=0)
    ends = {"lookup": (30.0, 60.0), "scenes": (180.0,), "everything": (200.0, 600.0)}
    rows = [{"stage": stage, "seconds": end} for stage, at in ends.items() for end in at]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.seconds = 600.0
    record = run.record()
    assert record["minutes"] == {"lookup": 1.0, "scenes": 2.0, "everything": 7.0, "all": 10.0}
    assert (record["seed"], record["hr"], record["machine"]["threads"]) == (3, False, torch.get_num_threads())


def test_digits_places_and_counts_weigh_more(tmp_path):
    run = train.Run(tmp_path, seed=0, hr=True, stages=STAGES, workers=0)
    batch = data.told(run.processor, 0, 0, 2, **FACTS)
    with torch.no_grad():
        codes = run.codes(batch, run.model.get_input_embeddings())
        loss, _ = chat_loss(run.model, batch, run.content, codes)
        embeds = run.model.model.splice(run.model.get_input_embeddings()(batch["ids"]), codes, batch["marks"])
        hidden = run.model.model.language_model(inputs_embeds=embeds, attention_mask=batch["mask"]).last_hidden_state
        scores = run.model.lm_head(hidden[:, :-1]).log_softmax(-1)
    wanted = batch["ids"][:, 1:]
    surprise = -scores.gather(-1, wanted[..., None])[..., 0]
    weight = (batch["answers"][:, 1:] == 1) * (
        1 + 2.0 * torch.isin(wanted, torch.cat([run.content[name] for name in ("digit", "place", "count")]))
    )
    assert (weight == 3).any() and (weight == 1).any()
    torch.testing.assert_close(loss, (surprise * weight).sum() / weight.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    """A stopped run ends like an unbroken one: same state of both optimizers, same batches and same noise."""
    search = next(stage for stage in STAGES if stage.name == "search")
    stages = (dataclasses.replace(search, steps=3, batch=2),)

    def run(folder) -> train.Run:
        return train.Run(tmp_path / folder, seed=0, hr=True, stages=stages, workers=0)

    whole = run("whole")
    assert whole.train()
    assert not run("cut").train(minutes=0)
    resumed = run("cut")
    assert resumed.step == 1 and resumed.train()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for one, other in ((whole.model, resumed.model), (whole.codes, resumed.codes)):
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_muon_has_the_matrices_and_adamw_the_rest(stage):
    parts = {name: getattr(make_model(0).model, name) for name in stage.learns}
    adamw, *muon = make_optimizers(stage, parts)
    times = {
        id(p): group["times"]
        for optimizer in (adamw, *muon)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    by_muon = {id(p) for optimizer in muon for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for optimizer in (adamw, *muon) for group in optimizer.param_groups) == len(times)
    for part, module in parts.items():
        for name, p in module.named_parameters():
            matrix = p.dim() == 2 and "embed_tokens" not in name and "position_embedding" not in name
            assert (id(p) in by_muon) == matrix, (part, name)
            bridge = stage.lesson == "scenes" and part in ("mm_projector", "patch_mining")
            assert times[id(p)] == (3 if matrix else 1) * (3 if bridge else 1), (part, name)


def test_codes_are_blurred_anew_at_every_step(tmp_path, monkeypatch):
    run = train.Run(tmp_path, seed=0, hr=True, stages=STAGES, workers=0)
    stage = next(stage for stage in STAGES if stage.name == "search")
    batch = run._batch(dataclasses.replace(stage, batch=2), 0)
    losses = []
    for run.step in (0, 1, 1):
        with torch.no_grad():
            losses.append(run._loss(stage, batch)[0].item())
    assert losses[0] != losses[1] == losses[2]
    # Noise differs between conversations and the facts beside them, and between stages at the same step.
    seen = []
    monkeypatch.setattr(
        train, "blurred", lambda codes, noise, generator: seen.append(torch.randn(3, generator=generator)) or codes
    )
    language = next(stage for stage in STAGES if stage.name == "language")
    for stage in (language, next(stage for stage in STAGES if stage.name == "search")):
        with torch.no_grad():
            run._loss(stage, run._batch(dataclasses.replace(stage, batch=2), 1))
    monkeypatch.undo()
    assert len(seen) == 3 and len({tuple(noise.tolist()) for noise in seen}) == 3
    codes = torch.ones(2, 36, 512)
    blurred = train.blurred(codes, 0.4, torch.Generator().manual_seed(0))
    strength = blurred.mean(-1)
    assert 0.6 < strength.min() < 0.75 and 1.05 < strength.max() < 1.2
    assert abs((blurred - strength[..., None]).std() - 0.4) < 0.02


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (evaluation, ["NANO", "--count", "0"], "expected at least one scene, got --count 0"),
        (evaluation, ["NANO", "--without", "NANO"], "was trained with the high-resolution branch"),
        (evaluation, ["FILE"], "expected a folder that recipes.nano.train wrote"),
        (train, ["FILE"], "expected a folder to train in"),
        (train, ["NEW", "--minutes", "0"], "expected more than 0 minutes, got --minutes 0"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(command, arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    places = {"NANO": builtin.resolve("nano"), "FILE": tmp_path / "file", "NEW": tmp_path / "new"}
    monkeypatch.setattr("sys.argv", ["nano", *(str(places.get(argument, argument)) for argument in arguments)])
    with pytest.raises(SystemExit) as refused:
        command.main()
    assert refused.value.code == 2 and said in capsys.readouterr().err
    assert not places["NEW"].exists()


def test_without_the_high_resolution_branch_nothing_is_mined(tmp_path):
    stages = (
        TrainingStage("digits", 9, 2, 1e-3, ("vision_tower_aux",)),
        TrainingStage("everything", 1, 2, 1e-3, BRIDGE),
    )
    run = train.Run(tmp_path, seed=0, hr=False, stages=stages, workers=0)
    assert run.train()
    # Pages of print would only train the tower that is missing.
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    model = MiniGeminiForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    low, high = torch.randn(1, 1, 3, LR_SIDE, LR_SIDE), torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        seen = [model.get_image_features(low, pixels).pooler_output for pixels in (high, torch.zeros_like(high))]
    torch.testing.assert_close(*seen, rtol=0, atol=0)
