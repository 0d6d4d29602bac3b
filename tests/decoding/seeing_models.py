"""A small language model that attends to features, as the decode loop calls it, and what tests ask it."""

import hashlib

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mg_fast.models.causal_lm import CausalLM
from mg_fast.models.protocol import PassInputs, content_key

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # The weights are spread so wide that every prompt has its own answer.
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FEATURE_WIDTH = 8


def random_model(make, config, seed=0):
    torch.manual_seed(seed)
    return make(config).eval()


class CrossLayer(LlamaDecoderLayer):
    """A decoder layer whose positions attend, through a gate, to the features that they may see."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.query, self.read = (
            nn.Linear(config.hidden_size, FEATURE_WIDTH),
            nn.Linear(FEATURE_WIDTH, config.hidden_size),
        )
        self.gate = nn.Parameter(torch.tensor([0.7]))

    def forward(self, hidden_states, features=None, feature_mask=None, **kwargs):
        """Runs the layer.

        Args:
            hidden_states: as of the Llama layer.
            features: [B, n, tokens, FEATURE_WIDTH].
            feature_mask: [B, Q, n], 1 where a position sees the features of a picture.
        """
        hidden = super().forward(hidden_states, **kwargs)
        if features is None:
            return hidden
        # transformers' own loop passes the mask of the prompt to every pass; a new token takes the last row of it.
        mask = feature_mask[:, -hidden.shape[1] :]
        scores = torch.einsum("bqd,bntd->bqnt", self.query(hidden), features) + (1 - mask[..., None]) * -1e4
        shares = torch.cat([scores.flatten(2), scores.new_zeros(*scores.shape[:2], 1)], dim=-1).softmax(dim=-1)[
            ..., :-1
        ]
        seen = torch.einsum("bqk,bkd->bqd", shares, features.flatten(1, 2))
        return hidden + self.gate.tanh() * self.read(seen)


class SeeingLlama(LlamaForCausalLM):
    """A Llama whose second layer attends to features."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1] = CrossLayer(config, 1)
        self.post_init()

    def forward(self, input_ids=None, features=None, feature_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, features=features, feature_mask=feature_mask, **kwargs)


class SeeingLM(CausalLM):
    """A SeeingLlama as the decode loop calls it."""

    def pass_inputs(self, model_inputs):
        if model_inputs.get("features") is None:
            return super().pass_inputs(model_inputs)
        return PassInputs({"features": model_inputs["features"]}, {"feature_mask": model_inputs["feature_mask"]})

    def position_keys(self, ids, model_inputs, digests):
        """The number of a position stands for its id and for the features that it sees."""
        keys = super().position_keys(ids, model_inputs, digests)
        if model_inputs.get("features") is None:
            return keys
        if not digests:
            return None
        rows = model_inputs["feature_mask"][0].tolist()
        # The answer sees the same features as the end of the prompt.
        rows += rows[-1:] * (len(keys) - len(rows))
        seen = [b"".join(digest for digest, sees in zip(digests, row) if sees) for row in rows]
        return [content_key(hashlib.sha256(what).digest(), key) for what, key in zip(seen, keys)]


def prompt(length, seed, rows=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def features(seed, pictures=1, rows=1):
    return torch.randn(rows, pictures, 3, FEATURE_WIDTH, generator=torch.Generator().manual_seed(seed)) * 3


def seen_from(length, *places, rows=1):
    """The feature mask for pictures that are each seen from their own place on."""
    return torch.stack([torch.arange(length) >= place for place in places], dim=1).float().expand(rows, -1, -1).clone()


def options(ids, **given):
    mask = given.pop("attention_mask", torch.ones_like(ids))
    return {**dict(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None), **given}


def decoded(model, decoder, request=None, **given):
    return model.generate(**options(**given), custom_generate=request or decoder.request())
