"""The painter's vocabulary: every word of nano's wishes is one token, and other words fall into pieces."""

from collections import Counter
from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from mg_fast.testing.random_pipelines import byte_tokenizer

# What CLIP's tokenizers write behind the last letter of a word.
END = "</w>"


def make_tokenizer(texts: Iterable[str], most: int) -> CLIPTokenizer:
    """A tokenizer of CLIP's kind to which every word of these texts is one token.

    Any text can be read, because every byte is a token, too. The same texts always give the same tokens, as a run that
    continues needs it. The training in the package `tokenizers` differs from time to time where pairs are equally
    frequent.

    Args:
        most: how many tokens are read of a prompt.
    """
    plain = byte_tokenizer().backend_tokenizer
    found = {
        word for text in texts for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
    }
    merges = _merges(found)
    letters = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + END for letter in letters), *map("".join, merges)])
    numbers = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(numbers, merges, model_max_length=most)


def _merges(words: set[str]) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, in their order, until every word is one piece (Sennrich et al. 2016)."""
    pieces = [[*word[:-1], word[-1] + END] for word in sorted(words)]
    merges = []
    while counts := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        # Of pairs that are equally frequent, the first in the order of their letters is joined.
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_joined(word, best) for word in pieces]
    return merges


def _joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for piece in word:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found
