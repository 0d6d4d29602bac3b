"""The tokenizer of MM-Interleaved: Llama's sentencepiece model, and two tokens for pictures."""

import os
from pathlib import Path

from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from ...errors import CheckpointError
from ..registration import register_tokenizer
from ..tensor_files import first_line
from .configuration import MMInterleavedConfig

SOI_TOKEN, IMAGE_TOKEN = "<|beginofimage|>", "<|image|>"
VOCABULARY_FILE = "tokenizer.model"


class MMInterleavedTokenizer(SentencePieceBackend):
    """The slow Llama tokenizer with the special tokens `<|beginofimage|>` and `<|image|>`, as the original uses it.

    - The special tokens `<s>`, `</s>`, `<unk>` and the two of pictures are recognized inside a text.
    - Every piece of text between special tokens is tokenized by itself and begins with its own word-start mark.
    - White space beside the two tokens of pictures vanishes. White space beside `<s>`, `</s>` and `<unk>` stays.
    - One `<s>` is put before every text.

    The id that pads a batch stands for an ordinary piece of text, so the tokenizer does not know it as a special token.

    Args:
        vocab_file: the sentencepiece model, `tokenizer.model`.
        **kwargs: the settings that `save_pretrained` wrote.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs):
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
        settings |= {"extra_special_tokens": [SOI_TOKEN, IMAGE_TOKEN], "clean_up_tokenization_spaces": False}
        settings |= {"special_tokens_pattern": "bos", "token_type_ids_pattern": "all_zeros", "legacy": True}
        super().__init__(vocab_file=vocab_file, **(settings | kwargs))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "MMInterleavedTokenizer":
        """The tokenizer of a Llama model's folder, with the tokens of pictures after the last piece of its vocabulary.

        Raises:
            CheckpointError: the folder has no `tokenizer.model`, or the file cannot be read, or it has other special
                tokens than Llama's.
        """
        import sentencepiece

        file = Path(folder) / VOCABULARY_FILE
        if not file.is_file():
            raise CheckpointError(f"no tokenizer in {folder}: expected {VOCABULARY_FILE}, a sentencepiece model")
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except Exception as error:  # sentencepiece raises bare errors on broken files.
            raise CheckpointError(f"{file} cannot be read as a sentencepiece model: {first_line(error)}") from error
        ordinary = {text: pieces.piece_to_id(text) for text in ("<unk>", "<s>", "</s>")}
        if len(set(ordinary.values())) < 3:
            raise CheckpointError(f"{file}: expected the pieces <unk>, <s> and </s>, as Llama's tokenizer has them")
        tokens = {id: AddedToken(text, normalized=False, special=True) for text, id in ordinary.items()}
        for i, text in enumerate((SOI_TOKEN, IMAGE_TOKEN)):
            # The flags let white space on both sides vanish.
            flags = {"lstrip": True, "rstrip": True, "normalized": False, "special": True}
            tokens[pieces.get_piece_size() + i] = AddedToken(text, **flags)
        return cls(str(file), added_tokens_decoder=tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, written as the original writes it.

        Tokens of pictures have a blank on both sides, and so has a special token after text, on its left side. Bytes
        that are no text become the replacement character.
        """
        parts, run = [], []
        for token in tokens:
            if token in (SOI_TOKEN, IMAGE_TOKEN):
                parts += [self._text_of(run)] * bool(run) + [token]
                run = []
            else:
                run.append(token)
        return " ".join(parts + [self._text_of(run)] * bool(run))

    def _text_of(self, tokens: list[str]) -> str:
        text, run = "", []
        for i, token in enumerate(tokens):
            if token in (self.bos_token, self.eos_token, self.unk_token):
                between = " " if run and i else ""
                text, run = text + between + self.sp_model.decode(run) + token, []
            else:
                run.append(token)
        return text + self.sp_model.decode(run)


register_tokenizer(MMInterleavedConfig, MMInterleavedTokenizer)
