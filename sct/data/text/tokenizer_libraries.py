"""Give the libraries `tokenizers` and `sentencepiece` one interface; both are imported only when needed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

from sct.errors import ConfigError
from sct.extras import load_extra

JSON, MODEL = "tokenizer.json", "tokenizer.model"
ROLES = ("bos", "eos", "pad", "unk")


class Backend(Protocol):
    """Interface of a tokenizer library. Token ids are lists of int."""

    file: str  # name of the tokenizer file
    size: int  # number of tokens

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Return the token ids of each text. With `special`, add the tokenizer's special tokens around each text."""

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Convert token ids to text."""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None."""

    def token_of(self, number: int) -> str | None:
        """Return the token of an id, or None."""

    def add(self, tokens: Sequence[str]) -> Backend:
        """Return a copy with additional special tokens after the existing tokens."""

    def content(self) -> bytes:
        """Return the bytes of the tokenizer file."""

    def config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json without the special tokens."""

    def roles(self) -> dict[str, str]:
        """Return the special tokens that the tokenizer file itself defines, by role."""


class JsonTokenizer:
    """Use a tokenizer.json with the library `tokenizers`."""

    file = JSON

    def __init__(self, content: bytes, where: str) -> None:
        library = import_tokenizers()
        try:
            self._model = library.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(
                f"{where} is not a valid tokenizer.json ({error}): give the original file of the tokenizer."
            ) from None
        # The file may store truncation and padding of an earlier use. The caller decides about lengths.
        self._model.no_truncation()
        self._model.no_padding()
        self.size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Return the token ids of each text. With `special`, add the tokenizer's special tokens around each text."""
        return [encoding.ids for encoding in self._model.encode_batch(texts, add_special_tokens=special)]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Convert token ids to text."""
        return self._model.decode(ids, skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._model.token_to_id(token)

    def token_of(self, number: int) -> str | None:
        """Return the token of an id, or None."""
        return self._model.id_to_token(number)

    def add(self, tokens: Sequence[str]) -> Backend:
        """Return a copy with additional special tokens after the existing tokens."""
        copy = JsonTokenizer(self.content(), "a copy")
        added = [import_tokenizers().AddedToken(token, special=True, normalized=False) for token in tokens]
        copy._model.add_special_tokens(added)
        return JsonTokenizer(copy.content(), "a copy")

    def content(self) -> bytes:
        """Return the bytes of the tokenizer file."""
        return self._model.to_str().encode()

    def config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json without the special tokens."""
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}

    def roles(self) -> dict[str, str]:
        """Return the special tokens that the tokenizer file itself defines, by role."""
        return {}


class PieceTokenizer:
    """Use a tokenizer.model with the library `sentencepiece`; tokens can be added after the tokens of the file.

    The text between added tokens is encoded separately. The model adds a space before each separately encoded text, and
    therefore also after an added token. Text that equals a control token, such as "<s>", is encoded as ordinary text.
    """

    file = MODEL

    def __init__(self, content: bytes, added: tuple[str, ...], bos: bool, eos: bool, where: str) -> None:
        sentencepiece = load_extra("sentencepiece", "text", what="tokenizer.model")
        self._bytes, self._where = content, where
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # RuntimeError or TypeError, by version
            raise ConfigError(
                f"{where} is not a valid sentencepiece model ({error}): give the original file of the tokenizer."
            ) from None
        self._pieces = self._model.get_piece_size()
        self._added, self._bos, self._eos = added, bos, eos
        self._ids = {token: self._pieces + i for i, token in enumerate(added)}
        self._known = {self._model.id_to_piece(i): i for i in range(self._pieces)} | self._ids
        self.size = self._pieces + len(added)
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None

    def __getstate__(self) -> tuple[Any, ...]:
        return self._bytes, self._added, self._bos, self._eos, self._where

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Return the token ids of each text. With `special`, add the tokenizer's special tokens around each text."""
        if self._split is None:
            ids = self._model.encode(list(texts), out_type=int)
        else:
            ids = [self._encode_around(text) for text in texts]
        before = [self._model.bos_id()] if special and self._bos and self._model.bos_id() >= 0 else []
        after = [self._model.eos_id()] if special and self._eos and self._model.eos_id() >= 0 else []
        return [before + one + after for one in ids] if before or after else ids

    def _encode_around(self, text: str) -> list[int]:
        """Return the ids of a text that may contain added tokens. Text between added tokens is encoded separately."""
        assert self._split is not None
        ids: list[int] = []
        for i, segment in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._ids[segment])
            elif segment:
                ids += self._model.encode(segment, out_type=int)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Convert token ids to text."""
        text, run = [], []
        for number in ids:
            special = number >= self._pieces or self._model.is_control(number)
            if not special:
                run.append(number)
                continue
            if not skip_special:
                text += [self._model.decode(run), self.token_of(number) or ""]
                run = []
        return "".join([*text, self._model.decode(run)])

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._known.get(token)

    def token_of(self, number: int) -> str | None:
        """Return the token of an id, or None."""
        inside = number < self._pieces
        return self._model.id_to_piece(number) if inside else self._added[number - self._pieces]

    def add(self, tokens: Sequence[str]) -> Backend:
        """Return a copy with additional special tokens after the existing tokens."""
        new = tuple(token for token in tokens if token not in self._known)
        return PieceTokenizer(self._bytes, self._added + new, self._bos, self._eos, self._where)

    def content(self) -> bytes:
        """Return the bytes of the tokenizer file."""
        return self._bytes

    def config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json without the special tokens."""
        decoder = {
            str(number): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": True,
            }
            for token, number in self._ids.items()
        }  # fmt: skip
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "clean_up_tokenization_spaces": False}
        return {
            **config,
            "add_bos_token": self._bos,
            "add_eos_token": self._eos,
            "added_tokens_decoder": decoder,
        }

    def roles(self) -> dict[str, str]:
        """Return the special tokens that the tokenizer file itself defines, by role."""
        ids = {role: getattr(self._model, f"{role}_id")() for role in ROLES}
        return {role: self._model.id_to_piece(number) for role, number in ids.items() if number >= 0}


def import_tokenizers() -> Any:
    """Import the library `tokenizers` and the modules used here; raise `MissingExtraError` if it is not installed."""
    library = load_extra("tokenizers", "text", what="reading text")
    for part in ("decoders", "models", "pre_tokenizers", "trainers"):
        importlib.import_module(f"tokenizers.{part}")
    return library
