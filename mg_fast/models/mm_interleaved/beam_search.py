"""Beam search by the rules of transformers 4.31, with which the original was published.

Later releases score beams differently: see `BeamSearch`.
"""

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateBeamDecoderOnlyOutput

from ...errors import PromptError
from ...runtime.layer_dtypes import call
from ..protocol import CACHE, DecodableModel, PassInputs


class BeamSearch:
    """A loop for `generate(custom_generate=...)` that searches with beams as transformers 4.31 does.

    Its rules differ from those of transformers 5.17 in these points:

    - A text's log-likelihood is divided by a power of its length. The length counts the BOS with which the original
      begins a new text, and not the token that ends one.
    - The search of a row ends when `num_beams` texts have ended and the best of all candidates of a step, those that
      end a text included, cannot beat the worst of them. transformers 5.17 looks at the best running beam.
    - When the search stops, all running beams compete with the texts that ended. transformers 5.17 takes only those
      among the best `num_beams` candidates of the last step.
    - A text that ended ends with the first of the tokens that may end one, whichever it was.

    As in the original, (1 + number of tokens that may end a text) * num_beams candidates are looked at in a step, and
    at least twice num_beams. The prompt is run once for all beams of a row.

    Args:
        model: the model that computes.
    """

    def __init__(self, model: DecodableModel):
        self.model = model

    @torch.inference_mode()
    def __call__(
        self,
        generating: torch.nn.Module,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs,
    ) -> "torch.Tensor | GenerateBeamDecoderOnlyOutput":
        """Continues ids [B * num_beams, L], whose rows are repeated for the beams, to the best texts of each row.

        Args:
            generating: the model of transformers whose `generate` calls this. It is not used.

        Returns:
            Ids [B * num_return_sequences, L + new], or with `return_dict_in_generate` these and their scores.
        """
        beams, length = generation_config.num_beams, input_ids.shape[1]
        ends = _as_list(generation_config.eos_token_id)
        penalty, early = generation_config.length_penalty, generation_config.early_stopping
        # The original's lengths count the BOS that begins a text.
        longest = stopping_criteria.max_length - length + 1
        rows = [FinishedTexts(beams, penalty, early, longest) for _ in range(len(input_ids) // beams)]
        logits, step = self._prefill(input_ids, beams, model_inputs)
        others = StoppingCriteriaList(c for c in stopping_criteria if not hasattr(c, "eos_token_id"))
        scores = torch.tensor([0.0] + [-1e9] * (beams - 1), device=input_ids.device).repeat(len(rows))
        ids = input_ids
        while True:
            likelihoods = logits.to(input_ids.device, torch.float32).log_softmax(dim=-1)
            totals = logits_processor(ids, likelihoods) + scores[:, None]
            vocabulary = totals.shape[-1]
            best, places = totals.view(len(rows), -1).topk(max(2, 1 + len(ends)) * beams, dim=1)
            if not best[:, 0].isfinite().all():
                raise FloatingPointError(
                    f"the scores of new token {ids.shape[1] - length + 1} are not finite: the logits hold NaN, or no "
                    "token is allowed"
                )
            next_beams = []
            for row, (found, values, wheres) in enumerate(zip(rows, best.tolist(), places.tolist())):
                candidates = [
                    (value, row * beams + where // vocabulary, where % vocabulary)
                    for value, where in zip(values, wheres)
                ]
                next_beams += found.take(candidates, ids, length, ends)
            values, sources, tokens = zip(*next_beams)
            sources = torch.tensor(sources, device=ids.device)
            scores = torch.tensor(values, device=ids.device)
            ids = torch.cat([ids[sources], torch.tensor(tokens, device=ids.device)[:, None]], dim=1)
            if all(found.done for found in rows) or bool(others(ids, None).all()):
                break
            logits = step(ids[:, -1:], sources)
        for row, found in enumerate(rows):
            found.close(ids[row * beams : (row + 1) * beams], scores[row * beams : (row + 1) * beams].tolist(), length)
        return self._result(rows, input_ids[::beams], generation_config, ends, stopping_criteria.max_length)

    def _prefill(self, input_ids: torch.Tensor, beams: int, model_inputs: dict):
        """The logits [B * beams, vocabulary] after the prompt, and the function that runs a further token."""
        model, ids = self.model, input_ids[::beams]
        given = model_inputs.get(CACHE)
        if given is not None and given.get_seq_length():
            raise PromptError("beam search begins with the whole prompt: it takes no keys and values of earlier tokens")
        mask = model_inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[::beams]
        inputs = model.pass_inputs(model_inputs)
        by_position = {name: rows[::beams] for name, rows in inputs.by_position.items()}
        prompt = {name: model_inputs.get(name) for name in model.prompt_inputs}
        cache = DynamicCache(config=model.text_config)

        def run(embeddings: torch.Tensor, start: int, further: PassInputs) -> torch.Tensor:
            stop = start + embeddings.shape[1]
            places = torch.arange(start, stop, device=embeddings.device)
            position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:stop]
            hidden = model.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=True,
                **{CACHE: cache},
                **further.at(places),
            ).last_hidden_state
            return call(model.head, hidden[:, -1:])[:, -1]

        logits = run(model.embed(ids, **prompt), 0, PassInputs(inputs.constant, by_position))
        logits = logits.repeat_interleave(beams, dim=0)
        cache.batch_repeat_interleave(beams)
        mask = mask.repeat_interleave(beams, dim=0)

        def step(tokens: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
            nonlocal mask
            cache.reorder_cache(sources)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            return run(model.embed_ids(tokens), mask.shape[1] - 1, inputs)

        return logits, step

    @staticmethod
    def _result(rows, prompts, config, ends: list[int], limit: int):
        kept = config.num_return_sequences or 1
        best = [text for found in rows for text in found.best(kept)]
        length = prompts.shape[1]
        total = min(length + max(len(tokens) for _, tokens in best) + 1, limit)
        filling = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
        ids = prompts.new_full((len(best), total), filling)
        ids[:, :length] = prompts.repeat_interleave(kept, dim=0)
        for row, (_, tokens) in enumerate(best):
            ids[row, length : length + len(tokens)] = tokens
            if ends and length + len(tokens) < limit:
                ids[row, length + len(tokens)] = ends[0]
        if not config.return_dict_in_generate:
            return ids
        return GenerateBeamDecoderOnlyOutput(
            sequences=ids, sequences_scores=torch.tensor([score for score, _ in best], device=ids.device)
        )


class FinishedTexts:
    """The best texts of one row that have ended.

    Args:
        beams: most texts.
        length_penalty: the power of its length by which a text's log-likelihood is divided.
        early_stopping: True ends a row once there are `beams` texts. False ends it when the best candidate of a step
            cannot beat the worst of them at its present length; "never", where `length_penalty` is positive, at the
            greatest length.
        longest: the greatest length, with the BOS.

    Attributes:
        done: whether no other text can become better.
    """

    def __init__(self, beams: int, length_penalty: float, early_stopping: bool | str, longest: int):
        self.beams, self.length_penalty, self.early_stopping = beams, length_penalty, early_stopping
        self.longest = longest
        self.texts: list[tuple[float, torch.Tensor]] = []
        self.done = False

    def take(self, candidates, ids: torch.Tensor, prompt: int, ends: list[int]) -> list[tuple[float, int, int]]:
        """The next beams, as score, row of the ids and token, out of candidates of this form, the best first."""
        if self.done:
            return [(0.0, candidates[0][1], candidates[0][2])] * self.beams
        going_on = []
        for rank, (score, source, token) in enumerate(candidates):
            if token not in ends:
                going_on.append((score, source, token))
            elif rank < self.beams:
                self._add(score, ids[source, prompt:])
            if len(going_on) == self.beams:
                break
        # The original counts the BOS and the token of this step.
        length = ids.shape[1] - prompt + 2
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.longest
        attainable = candidates[0][0] / length**self.length_penalty
        full = len(self.texts) == self.beams
        self.done = full and (self.early_stopping is True or min(self.texts, key=_score)[0] >= attainable)
        return going_on

    def close(self, ids: torch.Tensor, scores: list[float], prompt: int) -> None:
        """Adds the texts that have not ended, where others may still be better than those that have."""
        if not self.done:
            for score, row in zip(scores, ids):
                self._add(score, row[prompt:])

    def best(self, number: int) -> list[tuple[float, torch.Tensor]]:
        """Score and new tokens of the best texts."""
        return sorted(self.texts, key=_score)[::-1][:number]

    def _add(self, score: float, tokens: torch.Tensor) -> None:
        score /= (len(tokens) + 1) ** self.length_penalty
        if len(self.texts) == self.beams:
            worst = min(range(self.beams), key=lambda i: self.texts[i][0])
            if score <= self.texts[worst][0]:
                return
            del self.texts[worst]
        self.texts.append((score, tokens))


def _score(text: tuple[float, torch.Tensor]) -> float:
    return text[0]


def _as_list(ids) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
