"""A program that runs one of vLLM's engines in its own process and writes what it answered: there can be one a process.

    python -m tests.serve.engine CHECKPOINT RESULTS [LORA_FOLDER ...]

Without adapters, the engine takes whole prompts at a time. With adapters, it cuts every prompt after each `CUT` tokens.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT, original_golden

CUT = 64
NEW_TOKENS = 16
TEXTS = ("What is a number?", "Tell me a story.", "Hello?", "Which colour has the sky?")
# Random models answer for as long as they may. This bias makes a token certain.
CERTAIN = 1000.0

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make serve-test` installs it"
)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process with an engine: one process, one thread, no network."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **settings, **more}


def answered(checkpoint: Path, results: Path, *adapters: Path) -> dict:
    """Runs the program for a checkpoint and returns what it wrote."""
    command = [sys.executable, "-m", "tests.serve.engine", *map(str, (checkpoint, results, *adapters))]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(results.read_text())


def cases(folder: Path) -> dict[str, tuple[list[int], str]]:
    """The numbers of the pictures and the prompt of each recorded case, by its key in expected.safetensors."""
    expected = json.loads((folder / "expected.json").read_text())
    found, seen = {}, {}
    for case in expected["cases"]:
        number = seen[case["image"]] = seen.get(case["image"], -1) + 1
        found[f"image{case['image']}.prompt{number}"] = [case["image"]], case["prompt"]
    if "multi" in expected:
        found["multi"] = expected["multi"]["images"], expected["multi"]["prompt"]
    return found


def engine_options(checkpoint: Path) -> dict:
    """The options of `vllm.LLM` for one of the original's checkpoints, with its prompt template."""
    return {
        "model": str(checkpoint),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "limit_mm_per_prompt": {"image": 2},
        "hf_overrides": {"conversation_template": json.loads((checkpoint / "expected.json").read_text())["conv"]},
    }


def golden_folder(name: str) -> Path:
    """The folder of one of the original's checkpoints; skips the test where this machine has none."""
    if original_golden() is None:
        pytest.skip("the original's outputs are not here: set MG_FAST_GOLDEN to their folder")
    return original_golden() / name


def main(checkpoint: Path, results: Path, adapters: list[Path]) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from mg_fast.models.templates import render, stop_ids
    from tests.serve.counting_worker import Counting

    options = engine_options(checkpoint)
    template = options["hf_overrides"]["conversation_template"]
    # On a CPU, vLLM computes requests without an adapter with the last of its places for adapters. One stays empty.
    if adapters:
        options |= {"enable_lora": True, "max_lora_rank": 8, "max_loras": len(adapters) + 1}
        options["max_num_batched_tokens"] = CUT
    # The blocks of the prefix cache. vLLM's own choice is larger than these prompts.
    llm = LLM(**options, block_size=32, logprobs_mode="raw_logits", max_logprobs=-1)
    recorded = cases(checkpoint)
    pictures = [Image.open(checkpoint / f"image{i}.png") for i in range(2)]
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    with_logits = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=-1)

    def request(prompt: str, numbers=(), **more) -> dict:
        given = {"multi_modal_data": {"image": [pictures[i] for i in numbers]}} if numbers else {}
        return {"prompt": prompt, **given, **more}

    def run(requests, parameters=greedy, adapter=None) -> list[dict]:
        outputs = llm.generate(requests, parameters, lora_request=adapter, use_tqdm=False)
        return [
            {
                "prompt_ids": list(output.prompt_token_ids),
                "ids": list(output.outputs[0].token_ids),
                "reason": output.outputs[0].finish_reason,
                "cached": output.num_cached_tokens,
                "logits": _first_logits(output.outputs[0].logprobs),
            }
            for output in outputs
        ]

    def refused(requests) -> str:
        try:
            run(requests)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "answered"

    requests = {key: request(prompt, numbers) for key, (numbers, prompt) in recorded.items()}
    texts = [request(render(template, [(text, None)])) for text in TEXTS]
    said: dict = {"alone": {}, "again": {}}
    counting = Counting()
    counting.take_counted()
    for key, asked in requests.items():
        llm.reset_prefix_cache()
        [said["alone"][key]] = run([asked], with_logits)
        [said["again"][key]] = run([asked])
    said["encoded"] = sum(counting.take_counted())
    said["texts"] = run(texts)
    llm.reset_prefix_cache()
    together = [*requests, *TEXTS, *requests]
    said["together"] = list(zip(together, run([*requests.values(), *texts, *requests.values()])))
    if adapters:
        lora = [LoRARequest(folder.name, i, str(folder)) for i, folder in enumerate(adapters, 1)]
        asked = next(iter(requests.values()))
        said["adapted"] = [run([asked], with_logits, adapter)[0] for adapter in lora]
        said["mixed"] = run([asked, asked], greedy, [lora[0], None])
    else:
        renderer = llm.llm_engine.renderer
        prompt, tokenizer = texts[0], renderer.processor.tokenizer
        forced = {
            i: SamplingParams(temperature=0, max_tokens=4, logit_bias={i: CERTAIN})
            for i in stop_ids(template, tokenizer)
        }
        said["stops"] = {i: run([prompt], parameters)[0] for i, parameters in forced.items()}
        filler = tokenizer.convert_ids_to_tokens(renderer.processor.filler_id)
        tag, numbers = recorded["image0.prompt0"][1], [0]
        said["refused"] = {
            "filler": refused([request(tag + filler, numbers)]),
            "tag": refused([request(tag)]),
            "picture": refused([request(tag.replace("<image>", ""), numbers)]),
            "more pictures": refused([request(tag, [0, 1])]),
            "too many pictures": refused([request(tag.replace("<image>", "<image>" * 3), [0, 1, 0])]),
            "no picture": refused([{"prompt": tag, "multi_modal_data": {"image": ["photo.png"]}}]),
            "options": refused([request(tag, numbers, mm_processor_kwargs={"pad": False})]),
            "ids": refused([{"prompt_token_ids": [5, 6], "multi_modal_data": {"image": [pictures[0]]}}]),
        }
        said["filler in text"] = run([request(render(template, [(f"Is {filler} a word?", None)]))])[0]
        picture = {"type": "image_pil", "image_pil": pictures[0]}
        content = [picture, {"type": "text", "text": "What is this?"}, {**picture, "image_pil": pictures[1]}]
        output = llm.chat([{"role": "user", "content": content}], greedy, use_tqdm=False)[0]
        said["chat"] = {"prompt_ids": list(output.prompt_token_ids), "ids": list(output.outputs[0].token_ids)}
    results.write_text(json.dumps(said))


def _first_logits(logprobs) -> list[float] | None:
    """The logits of the first new token, in the order of their ids; None where none were asked for."""
    if not logprobs:
        return None
    return [logprobs[0][i].logprob for i in range(len(logprobs[0]))]


if __name__ == "__main__":
    first, second, *others = map(Path, sys.argv[1:])
    main(first, second, others)
