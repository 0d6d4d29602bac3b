"""The count of a training step, against what was allocated and torch's FLOP, and the case that times one."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import training
from bench.__main__ import main
from bench.cases import all_cases
from bench.cases.training import CASES
from bench.check import check
from bench.counting import Count
from bench.rows import empty_row
from bench.training import TrainingStep, predict
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers
from mg_fast.testing.random_checkpoints import make_config, make_model
from recipes.finetune.features import feature_bytes
from recipes.finetune.run import fine_tune
from recipes.finetune.trainer import FineTuneTrainer
from tests.families import family
from tests.recipes.finetuning import CAPTIONS, SAMPLES
from tests.recipes.finetuning import make_config as make_training

GB = 1e9


def tiny_step(
    stage: int, checkpointing: bool, size: str = "tiny", experts: str | None = None, shape=(2, 90), forget=True
):
    """A step of a tiny model on the CPU, as a call that frees its gradients."""
    torch.manual_seed(0)
    model = make_model(make_config(size)).train()
    if experts is not None:
        model.set_experts_implementation(experts)
    config = model.config
    towers = FrozenTowers(model.model)
    side, large = config.vision_config.image_size, config.image_size_aux
    features = towers(torch.randn(2, 1, 3, side, side), torch.randn(2, 3, large, large))
    training.choose_learned(model, stage)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(5, 300, shape)
    marks = torch.zeros_like(ids)
    marks[:, 1 : config.tokens_per_picture + 1] = 1
    return lambda: training.loss_and_gradients(model, features, ids, marks=marks, forget=forget)


def allocated(call) -> int:
    """The most bytes that torch's allocator had given out within a call on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [
        (e.start_ns(), i, e.nbytes())
        for i, e in enumerate(profiled.profiler.kineto_results.events())
        if e.name() == "[memory]"
    ]
    return max(itertools.accumulate(size for *_, size in sorted(events)))


@pytest.mark.parametrize("stage, checkpointing", [(1, False), (2, False), (2, True)])
def test_the_count_is_what_was_allocated(stage, checkpointing, one_thread):
    call = tiny_step(stage, checkpointing)
    # The first call makes tables.
    call()
    with Count("cpu") as count:
        call()
    assert count.peak == pytest.approx(allocated(call), rel=0.03)
    with FlopCounterMode(display=False) as flop:
        call()
    assert count.total.flop == flop.get_total_flops() > 0


@pytest.mark.parametrize("stage, samples", [(1, CAPTIONS[:1]), (2, SAMPLES[:1])])
def test_the_count_is_what_the_recipe_allocates(stage, samples, tmp_path, monkeypatch, one_thread):
    """A step of the recipe itself, in float32 on the CPU, where gradients stay."""
    found, step = [], FineTuneTrainer.training_step

    def measured(trainer, model, inputs, *rest):
        found.append((inputs["input_ids"].shape, allocated(lambda: step(trainer, model, inputs, *rest))))
        return torch.tensor(0.0)

    monkeypatch.setattr(FineTuneTrainer, "training_step", measured)
    fine_tune(make_training(tmp_path, family("standard").folder, samples * 2, stage))
    [_, (shape, real)] = found
    call = tiny_step(stage, False, shape=shape, forget=False)
    call()
    with Count("cpu") as count:
        call()
    features = 2 * feature_bytes(make_config("tiny"), torch.float32)
    # The prediction adds all features; some of them are free when the most is allocated.
    assert count.peak <= real <= count.peak + features


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixtrals_experts_are_counted(checkpointing, one_thread):
    """Each token takes two of four. torch's counter sees their products where experts run one after the other."""
    call = tiny_step(2, checkpointing, "tiny-mixtral")
    call()
    with Count("cpu") as count:
        call()
    # Where layers are computed again, more is counted than was allocated.
    assert -0.03 < count.peak / allocated(call) - 1 < (0.25 if checkpointing else 0.03)
    call = tiny_step(2, checkpointing, "tiny-mixtral", "eager")
    with FlopCounterMode(display=False) as flop:
        call()
    grouped = count.costs["aten._grouped_mm.default"].flop
    text = make_config("tiny-mixtral").text_config
    pairs, widths = 2 * 90 * text.num_experts_per_tok, 3 * text.hidden_size * text.intermediate_size
    assert grouped == (3 + checkpointing) * text.num_hidden_layers * 2 * pairs * widths
    assert count.total.flop == flop.get_total_flops()


def test_checkpointing_saves_memory_and_costs_flop(one_thread):
    counts = []
    for checkpointing in (False, True):
        call = tiny_step(2, checkpointing)
        call()
        with Count("cpu") as count:
            call()
        counts.append((count.peak, count.total.flop))
    (peak, flop), (less, more) = counts
    assert less < peak and more > flop


@pytest.fixture(scope="module")
def predicted():
    if not torch.backends.cudnn.is_available():
        pytest.skip("takes a torch that is built for CUDA: no GPU")
    return {stage: predict(TrainingStep("7b", stage, batch=2, length=1024)) for stage in (1, 2)}


@pytest.mark.slow
def test_known_figures(predicted):
    """7B: what learns, 16 bytes for each such weight over eight GPUs, and six FLOP for a weight and a token."""
    picture_side = 6.97e6 + 1024 * 4096 + 4096 * 4096 + 2 * 4096
    assert predicted[1].learned == pytest.approx(picture_side, rel=1e-2)
    assert predicted[1].frozen == 6_738_415_616 and predicted[2].frozen == 0
    assert predicted[2].states == pytest.approx(16 * predicted[2].learned / 8, rel=1e-6)
    assert predicted[1].states == pytest.approx((2 * 6.738e9 + 16 * picture_side) / 8, rel=1e-2)
    # Forward, again for the backward pass, and two products for each of its weights there. In stage 1 one of the two.
    tokens, weights = 2 * 1024, 6.607e9 - 32000 * 4096
    for stage, times in ((1, 6), (2, 8)):
        products = times * tokens * weights + (times - 2) * tokens * 32000 * 4096
        rest = predicted[stage].flop - predicted[stage].tower_flop
        assert rest == pytest.approx(products, rel=0.06), stage
    assert predicted[1].tower_flop == pytest.approx(2 * 1.17e12, rel=0.03)
    # Packed: q, k and v of CLIP, and half of ConvNeXt, a second time.
    assert 1.0 * GB < predicted[1].towers < 1.6 * GB
    for p in predicted.values():
        assert p.peak == p.states + p.towers + max(p.gathered + p.activations, p.seeing)


@pytest.mark.slow
def test_the_command(predicted, monkeypatch, capsys):
    monkeypatch.setattr(training, "predict", lambda step: predicted[step.stage])
    assert main(["memory", "--train", "7b", "--stage", "2", "--devices", "8"]) == 0
    told = capsys.readouterr().out
    assert "7b, stage 2, FSDP on 8 device(s), 8 samples a GPU, each of 2048 tokens" in told and "peak of a GPU" in told


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--train", "7c"], "no model is called '7c': expected one of 2b, "),
        (["--train", "7b", "--stage", "3"], "there is no stage 3: expected 1 or 2"),
        (["--train", "7b-hd", "--length", "2880"], "length: expected a whole number of at least 2881, got 2880"),
        (["--train", "7b", "--check"], "--train predicts one step"),
    ],
)
def test_what_a_user_got_wrong(words, expected, capsys):
    assert main(["memory", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tiny")])
def test_the_case_is_right(name, one_thread):
    """Our form and the original's give the same loss and gradients."""
    [case] = [case for case in all_cases().values() if case.name.startswith(f"training/{name}")]
    case = case.restricted(["reference", "torch", "auto"])
    rows = {provider: empty_row(case, provider) for provider in case.providers}
    with torch.no_grad():
        check(case, case.make("cpu"), "cpu", rows)
    assert {provider: row["ok"] for provider, row in rows.items()} == dict.fromkeys(case.providers, True), rows
