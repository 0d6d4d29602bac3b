"""A program that runs a checkpoint in vLLM with two tensor-parallel ranks and writes what they answered and encoded.

    python -m tests.serve.ranks CHECKPOINT RESULTS MODE

Every rank is a process of its own, with one thread.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.serve.engine import NEW_TOKENS, cases, engine_options, environment

RANKS = 2


def answered_by_ranks(checkpoint: Path, results: Path, mode: str) -> dict:
    """Runs the program for a checkpoint and a value of `mm_encoder_tp_mode`, and returns what it wrote."""
    command = [sys.executable, "-m", "tests.serve.ranks", str(checkpoint), str(results), mode]
    # vLLM would bind each rank to a NUMA node of its own.
    more = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    done = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(results.read_text())


def main(checkpoint: Path, results: Path, mode: str) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(
        **engine_options(checkpoint),
        tensor_parallel_size=RANKS,
        mm_encoder_tp_mode=mode,
        worker_extension_cls="tests.serve.counting_worker.Counting",
    )
    pictures = [Image.open(checkpoint / f"image{i}.png") for i in range(2)]
    recorded = cases(checkpoint)
    requests = {
        key: {"prompt": prompt, "multi_modal_data": {"image": [pictures[i] for i in numbers]}}
        for key, (numbers, prompt) in recorded.items()
    }
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)

    def run(asked: dict) -> dict:
        """The ids by case, and the pictures in each of the encoder's calls by rank; nothing is known before."""
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        llm.collective_rpc("take_counted")
        outputs = llm.generate(list(asked.values()), greedy, use_tqdm=False)
        ids = {key: list(output.outputs[0].token_ids) for key, output in zip(asked, outputs)}
        return {"ids": ids, "encoded": llm.collective_rpc("take_counted")}

    said = {"together": run(requests), "alone": {key: run({key: asked}) for key, asked in requests.items()}}
    results.write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
