"""Records tests/golden: two tiny checkpoints and the answers of the reference path for them.

    python -m tests.make_golden

Run it only after tests/models/mini_gemini/test_original.py has passed on the machine: these outputs stand in for the
original's outputs where those are missing.
"""

import json

import torch
from matplotlib import cbook
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import mg_fast
from mg_fast.testing.random_checkpoints import build
from tests.paths import OWN_GOLDEN, original_golden

QUESTIONS = ("What is written in the picture?", "Describe it.")


def make_pictures() -> None:
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        photo.resize((171, 200)).save(OWN_GOLDEN / "photo.png")
    drawing = Image.new("RGB", (240, 130), (40, 90, 160))
    draw = ImageDraw.Draw(drawing)
    draw.rectangle((20, 20, 90, 110), fill=(240, 220, 60))
    draw.ellipse((110, 30, 190, 110), outline=(255, 255, 255), width=5)
    draw.text((120, 60), "4711", fill=(0, 0, 0))
    drawing.save(OWN_GOLDEN / "drawing.png")


def record(name: str, hd: bool, seed: int) -> None:
    folder = build(OWN_GOLDEN / name, size="tiny", hd=hd, seed=seed)
    processor = mg_fast.MiniGeminiProcessor.from_pretrained(folder, template="vicuna_v1")
    model = mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(folder)
    tensors, cases = {}, []
    prompts = [([file], f"<image>\n{question}") for file in ("photo.png", "drawing.png") for question in QUESTIONS]
    prompts.append((["photo.png", "drawing.png"], "<image>\n<image>\nCompare them."))
    with mg_fast.use_backend("reference"), torch.inference_mode():
        for i, (files, question) in enumerate(prompts):
            prompt = mg_fast.models.templates.render("vicuna_v1", [(question, None)])
            inputs = processor(text=prompt, images=[OWN_GOLDEN / file for file in files], return_tensors="pt")
            tensors[f"case{i}.input_ids"] = inputs["input_ids"]
            tensors[f"case{i}.pixel_sums"] = inputs["pixel_values_hr"].double().sum(dim=(-1, -2))
            tensors[f"case{i}.image_tokens"] = model.get_image_features(
                inputs["pixel_values"], inputs["pixel_values_hr"]
            ).pooler_output
            logits = model(**inputs, logits_to_keep=1).logits
            tensors[f"case{i}.last_logits"] = logits
            out = model.generate(
                **inputs, max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            tensors[f"case{i}.generated_ids"] = out.sequences[:, inputs["input_ids"].shape[1] :]
            tops = torch.stack([step.topk(2).values[0] for step in out.logits])
            cases.append({"images": files, "prompt": prompt, "smallest_margin": (tops[:, 0] - tops[:, 1]).min().item()})
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")
    print(name, [round(case["smallest_margin"], 3) for case in cases], tensors["case0.generated_ids"].tolist())


if __name__ == "__main__":
    if original_golden() is None:
        raise SystemExit(
            "the original's outputs are not here: "
            "without test_original.py passing, these recordings would prove nothing"
        )
    OWN_GOLDEN.mkdir(exist_ok=True)
    make_pictures()
    # With these seeds, the greedy choices are clear by more than rounding errors, so that the ids hold on every
    # machine.
    record("standard", hd=False, seed=3)
    record("hd", hd=True, seed=8)
