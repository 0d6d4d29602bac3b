"""Training with transformers' Trainer: the gradient of an accumulated batch, compared with transformers' own Llama."""

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.models.templates import render
from tests.families import family

# Rows of different lengths. The parts of an accumulated batch have different numbers of labels, so the mean of their
# means is not the mean of all labels.
TEXTS = [
    "What is this?",
    "Say more, and more than that, of what it is and why.",
    "Why?",
    "Tell me how many of them there are in all.",
]
# Ways to split 4 rows: (rows at once, parts that are accumulated).
SPLITS = [(4, 1), (1, 4)]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because all models here are tiny."""


class Gradients(TrainerCallback):
    """Keeps the gradients of the single step that is trained."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(model, rows, collate, folder, split, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    at_once, parts = split
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=parts,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    kept = Gradients()
    Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[kept]).train()
    return kept.found


def norm(found: dict[str, torch.Tensor]) -> float:
    return torch.stack([g.double().norm() for g in found.values()]).norm().item()


@pytest.fixture
def texts():
    """Rows of text, and the function that makes a batch of some of them."""
    processor = family("mgm-llama").processor

    def collate(rows):
        batch = processor.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]}, padding_side="right", return_tensors="pt"
        )
        return dict(batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))

    return [{"input_ids": processor.tokenizer(text).input_ids} for text in TEXTS], collate


@pytest.fixture
def pictures():
    """Questions about one, two, no and one picture, and the function that makes a batch of some of them."""
    found = family("mgm-llama")
    images = [[found.pictures[0]], list(found.pictures), [], [found.pictures[1]]]
    prompts = [
        render(found.processor.template, [("<image>\n" * len(own) + text, "Yes.")]) for text, own in zip(TEXTS, images)
    ]

    def collate(rows):
        batch = found.processor(
            text=[prompt for prompt, _ in rows],
            images=[own for _, own in rows] if any(own for _, own in rows) else None,
            return_tensors="pt",
        )
        # The first token of a row is not a target, because nothing or only padding stands before it.
        asked = (batch["attention_mask"] == 1) & (batch["attention_mask"].cumsum(1) > 1)
        if "mm_token_type_ids" in batch:
            asked &= batch["mm_token_type_ids"] == 0
        return dict(batch, labels=batch["input_ids"].masked_fill(~asked, -100))

    return list(zip(prompts, images)), collate


@pytest.fixture
def model():
    return MiniGeminiForConditionalGeneration.from_pretrained(family("mgm-llama").folder, template="vicuna_v1").train()


@pytest.fixture(scope="module")
def of_llama(tmp_path_factory):
    """The gradients of transformers' own Llama with the same weights, by how the rows are split and the options."""
    found = {}

    def gradients_of_llama(model, rows, collate, split, **options):
        key = split, *options.items()
        if key not in found:
            control = LlamaForCausalLM(model.config.text_config).train()
            control.model.load_state_dict(model.model.language_model.state_dict())
            control.lm_head.load_state_dict(model.lm_head.state_dict())
            found[key] = gradients(control, rows, collate, tmp_path_factory.mktemp("llama"), split, **options)
        return found[key]

    return gradients_of_llama


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label smoothing"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_text_is_trained_as_by_llama(model, of_llama, texts, tmp_path, split, options):
    theirs, whole = (of_llama(model, *texts, rows, **options) for rows in (split, (4, 1)))
    ours = gradients(model, *texts, tmp_path, split, **options)
    assert norm(ours) == pytest.approx(norm(theirs), rel=1e-4) == norm(whole)
    for name, gradient in theirs.items():
        own = ours[
            "lm_head.weight" if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}"
        ]
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6 * norm(whole))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label smoothing"])
def test_an_accumulated_batch_with_pictures_is_the_batch(model, pictures, tmp_path, options):
    whole, *others = [gradients(model, *pictures, tmp_path, split, **options) for split in SPLITS]
    assert norm({name: g for name, g in whole.items() if "patch_mining" in name}) > 0
    for found in others:
        assert norm(found) == pytest.approx(norm(whole), rel=1e-4)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-5 * norm(whole))


@pytest.mark.slow
def test_an_accumulated_batch_of_adapters_is_the_batch(model, pictures, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*_proj", init_lora_weights=False))
    whole, *others = [gradients(tuned, *pictures, tmp_path, split) for split in SPLITS]
    assert whole and all("lora" in name for name in whole)
    assert [norm(found) for found in others] == pytest.approx([norm(whole)] * len(others), rel=1e-4)


def test_a_mixed_batch_can_be_evaluated(model, pictures, tmp_path):
    """Batches with and without pictures can be evaluated together, although they return different further outputs."""
    rows, collate = pictures
    arguments = TrainingArguments(
        tmp_path,
        per_device_eval_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    lengths = []

    def measure(found):
        lengths.append(found.predictions.shape[0])
        return {}

    trainer = Trainer(model, arguments, eval_dataset=rows, data_collator=collate, compute_metrics=measure)
    assert trainer.evaluate()["eval_loss"] > 0 and lengths == [len(rows)]


def test_loss_arguments_reach_the_loss(model):
    ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids).loss
        count = ids[:, 1:].numel()
        torch.testing.assert_close(model(input_ids=ids, labels=ids, num_items_in_batch=4 * count).loss, mean / 4)
        torch.testing.assert_close(model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(count)).loss, mean)
        shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(model(input_ids=ids, labels=ids, shift_labels=shifted).loss, mean)
        without = model(input_ids=ids, labels=ids.masked_fill(ids == 7, -100)).loss
        torch.testing.assert_close(model(input_ids=ids, labels=ids, ignore_index=7).loss, without)
