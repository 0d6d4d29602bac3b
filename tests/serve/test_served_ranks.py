"""Two tensor-parallel ranks answer as the original does, and encode every picture both, or each its share."""

import pytest
from safetensors.torch import load_file

from tests.serve.engine import cases, golden_folder, needs_vllm
from tests.serve.ranks import RANKS, answered_by_ranks

# The ranks have a process and a core each. One engine runs after the other.
pytestmark = [needs_vllm, pytest.mark.xdist_group("ranks")]


def encoded_by_rank(mode: str, pictures: int) -> list[list[int]]:
    """The pictures in each of the encoder's calls by rank, where `pictures` came together."""
    if mode == "weights":
        return [[pictures]] * RANKS
    shares = [len(range(rank, pictures, RANKS)) for rank in range(RANKS)]
    return [[share] if share else [] for share in shares]


@pytest.mark.parametrize("mode", ["data", "weights"])
def test_two_ranks(mode, tmp_path):
    folder = golden_folder("mgm-llama")
    expected, recorded = load_file(folder / "expected.safetensors"), cases(folder)
    ids = {key: expected[f"{key}.generated_ids"].flatten().tolist() for key in recorded}
    said = answered_by_ranks(folder, tmp_path / "said.json", mode)
    # All prompts are about the same two pictures.
    assert said["together"] == {"ids": ids, "encoded": encoded_by_rank(mode, 2)}
    for key, (numbers, _) in recorded.items():
        assert said["alone"][key] == {"ids": {key: ids[key]}, "encoded": encoded_by_rank(mode, len(numbers))}, key
    assert said["alone"].keys() == recorded.keys() and "multi" in recorded
