"""Pictures that ranks encode together: equal shares, every picture once, and all tokens in the pictures' order."""

import pytest
import torch

from mg_fast.integrations.vllm.shares import encode_shares

TOKENS, HIDDEN = 3, 2


class Encoder:
    """Gives the tokens of a picture the picture's own number, and notes the numbers that it saw."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        numbers = pictures[:, 0, 0, 0]
        self.calls.append(numbers.tolist())
        return numbers.to(torch.bfloat16).view(-1, 1, 1).expand(-1, TOKENS, HIDDEN)


def together(pictures: torch.Tensor, ranks: int) -> tuple[list[torch.Tensor], list[Encoder]]:
    """What each of the ranks returns and encodes. All are run to their gathering first, and then to their end."""
    given = {"ranks": ranks, "shape": (TOKENS, HIDDEN), "dtype": torch.bfloat16, "device": torch.device("cpu")}
    sent: list[torch.Tensor] = []

    def send(tokens: torch.Tensor) -> torch.Tensor:
        sent.append(tokens)
        return torch.cat([tokens] * ranks)

    encoders = [Encoder() for _ in range(ranks)]
    for rank in range(ranks):
        encode_shares(encoders[rank], pictures, rank=rank, gather=send, **given)
    assert len({tokens.shape for tokens in sent}) == 1 and all(tokens.is_contiguous() for tokens in sent)
    again = (
        encode_shares(Encoder(), pictures, rank=i, gather=lambda _: torch.cat(sent), **given) for i in range(ranks)
    )
    return list(again), encoders


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_every_rank_gets_all_tokens_in_order(count, ranks):
    numbers = torch.arange(11, 11 + count, dtype=torch.uint8)
    returned, encoders = together(numbers.view(-1, 1, 1, 1).expand(-1, 4, 4, 3), ranks)
    expected = numbers.to(torch.bfloat16).view(-1, 1, 1).expand(-1, TOKENS, HIDDEN)
    for tokens in returned:
        assert tokens.dtype == torch.bfloat16 and torch.equal(tokens, expected)
    # One call for each rank that has something to encode, and no picture twice.
    assert all(len(encoder.calls) <= 1 for encoder in encoders)
    encoded = [sum(encoder.calls, []) for encoder in encoders]
    assert sorted(sum(encoded, [])) == numbers.tolist()
    sizes = [len(seen) for seen in encoded]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
