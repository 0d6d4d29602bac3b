"""Prompts of vLLM's requests: conversations to text, and text to ids as Mini-Gemini was trained."""

import dataclasses
from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.logger import init_logger
from vllm.renderers.chat_utils import ChatCompletionMessageParam, ConversationMessage
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs import DictPrompt
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.tokenizers.hf import HfTokenizer

from ...errors import MgFastError
from ...models.templates import IMAGE_TAG, get_template, single_token_ids, stop_ids
from .processing import as_list, make_processor

logger = init_logger(__name__)


class MiniGeminiRenderer(HfRenderer):
    """Renders conversations with the checkpoint's template, and tokenizes prompts piece by piece around their pictures.

    Every picture becomes one filler id, which `PictureProcessor` turns into its many places. vLLM calls the methods in
    several threads.

    Args:
        config: vLLM's configuration.
        tokenizer: the checkpoint's tokenizer, as vLLM loaded it.

    Raises:
        ValueError: vLLM was started without a tokenizer.
    """

    def __init__(self, config: VllmConfig, tokenizer: HfTokenizer | None) -> None:
        if tokenizer is None:
            raise ValueError("skip_tokenizer_init: Mini-Gemini's prompts need their tokenizer")
        super().__init__(config, tokenizer)
        self.processor = make_processor(config.model_config, self.tokenizer)
        self._eos_token_id = self._end_of_turn(config)

    def _end_of_turn(self, config: VllmConfig) -> int | None:
        """The id that ends an answer beside those of the checkpoint's generation_config.json, which vLLM knows."""
        template, tokenizer = self.processor.template, self.processor.tokenizer
        known = config.model_config.try_get_generation_config().get("eos_token_id") or []
        known = {known} if isinstance(known, int) else set(known)
        stops, (ends, _) = stop_ids(template, tokenizer), single_token_ids(tokenizer, get_template(template).stops)
        unknown = [stop for stop in stops if stop not in known]
        # vLLM takes one id from here, if possible one that it does not know of.
        order = [*(end for end in ends if end in unknown), *unknown, *ends, *stops]
        chosen = order[0] if order else None
        if left := [stop for stop in unknown if stop != chosen]:
            logger.warning(
                "generation_config.json does not name the ids %s, which also end answers under the template %s: "
                "answers run on after them unless a request names them in stop_token_ids",
                left,
                template,
            )
        return chosen

    def get_eos_token_id(self) -> int | None:
        return self._eos_token_id

    def render_messages(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        return super().render_messages(messages, self._with_template(params))

    async def render_messages_async(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        return await super().render_messages_async(messages, self._with_template(params))

    def _with_template(self, params: ChatParams) -> ChatParams:
        if params.chat_template_kwargs.get("tools"):
            raise VLLMValidationError("tools: Mini-Gemini was not trained to call any", parameter="tools")
        if params.chat_template is not None:
            return params
        return dataclasses.replace(params, chat_template=self.processor.chat_template)

    def render_chat(
        self,
        conversations: Sequence[list[ChatCompletionMessageParam]],
        chat_params: ChatParams,
        tok_params: TokenizeParams | None = None,
        **kwargs,
    ):
        return super().render_chat(conversations, chat_params, _with_bos(tok_params), **kwargs)

    async def render_chat_async(
        self,
        conversations: Sequence[list[ChatCompletionMessageParam]],
        chat_params: ChatParams,
        tok_params: TokenizeParams | None = None,
        **kwargs,
    ):
        return await super().render_chat_async(conversations, chat_params, _with_bos(tok_params), **kwargs)

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        text, pictures = prompt["prompt"], _count(prompt)
        if (tags := text.count(IMAGE_TAG)) != pictures:
            raise VLLMValidationError(
                f"the prompt has {tags} {IMAGE_TAG} tag(s), but {pictures} picture(s) came", parameter="prompt"
            )
        try:
            ids, marks = self.processor.encode(text, add_special_tokens=params.add_special_tokens, places=1)
        except MgFastError as error:
            raise VLLMValidationError(str(error), parameter="prompt") from error
        filler = self.processor.filler_id
        if pictures and ids.count(filler) > sum(marks):
            token = self.processor.tokenizer.convert_ids_to_tokens(filler)
            raise VLLMValidationError(
                f"the text of a prompt with pictures must not hold {token} or characters that the tokenizer does not "
                "know: this token marks the places of the pictures",
                parameter="prompt",
            )
        return TokensPrompt(prompt_token_ids=ids, **prompt)


def _with_bos(params: TokenizeParams | None) -> TokenizeParams | None:
    """The parameters with special tokens: chat requests ask for none, but our templates do not hold the first one."""
    return None if params is None else dataclasses.replace(params, add_special_tokens=True)


def _count(prompt: TextPrompt) -> int:
    """The number of pictures that come with a prompt, some perhaps only by the name that vLLM knows them by."""
    for given in (prompt.get("multi_modal_data"), prompt.get("multi_modal_uuids")):
        pictures = (given or {}).get("image")
        if pictures is not None:
            return len(as_list(pictures))
    return 0
