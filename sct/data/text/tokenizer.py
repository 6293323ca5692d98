"""One tokenizer type over the libraries `tokenizers` (tokenizer.json) and `sentencepiece` (tokenizer.model).

It never splits or joins text by itself: ids are those of the library that reads the file, and so of
`transformers` for the same folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sct.checks import check_choice
from sct.data.text.prompts import JOIN
from sct.data.text.tokenizer_libraries import (
    JSON,
    MODEL,
    ROLES,
    Backend,
    JsonTokenizer,
    PieceTokenizer,
    import_tokenizers,
)
from sct.errors import ConfigError

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCAB_SIZE = 9609  # Cell2Sentence paper, appendix C.0.1
_CONFIG = "tokenizer_config.json"
# Files beside a tokenizer's own that name its special tokens.
_ADDED, _SPECIAL = "added_tokens.json", "special_tokens_map.json"
_NAMED_BY_ID = ("generation_config.json", "config.json")
# All that `Tokenizer.load` reads of a folder.
FILES = (JSON, MODEL, _CONFIG, _ADDED, _SPECIAL, *_NAMED_BY_ID)
_ANCHOR = ":"
# Pieces that are never joined: words with a space before them, which may hold hyphens and dots, and other marks.
_WORDS = r" ?\w+(?:[-./]\w+)*| ?[^\s\w]+|\s+"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back.

    Attributes
    ----------
    backend
        The library's tokenizer; use the methods here.
    bos_token, eos_token, pad_token, unk_token
        Names of the special tokens, None where there is none.
    """

    backend: Backend
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None

    def __post_init__(self) -> None:
        for role in ROLES:
            token = getattr(self, f"{role}_token")
            if token is not None and self.backend.id_of(token) is None:
                raise ConfigError(
                    f"the {role} token {token!r} is not in the vocabulary of {self.backend.size:,} tokens; name "
                    f"one that is, or None"
                )

    def __repr__(self) -> str:
        return f"Tokenizer({self.backend.file}, {self.vocab_size:,} tokens, {self.fingerprint[:12]})"

    @classmethod
    def load(cls, path: str | os.PathLike[str], **tokens: str | None) -> Tokenizer:
        """Read a tokenizer.json, a tokenizer.model, or a folder with one (the first where it has both).

        Special tokens are named by the files beside it: tokenizer_config.json, special_tokens_map.json, then
        the ids in generation_config.json and config.json, then the model itself.

        Parameters
        ----------
        path
            File or folder.
        **tokens
            `bos`, `eos`, `pad`, `unk`: names that replace those of the files.

        Raises
        ------
        ConfigError
            There is no such file, it cannot be read, or a special token is not in the vocabulary.
        MissingExtraError
            The library is not installed.
        """
        path = Path(path)
        for role in tokens:
            check_choice("a special token", role, ROLES)
        if path.is_dir():
            found = [path / name for name in (JSON, MODEL) if (path / name).is_file()]
        else:
            found = [path] if path.is_file() and path.suffix in (".json", ".model") else []
        if not found:
            raise ConfigError(
                f"there is neither {JSON} nor {MODEL} at {path}; give such a file or the folder that holds one"
            )
        file = found[0]
        config = _read(file.parent / _CONFIG)
        content = file.read_bytes()
        backend: Backend
        if file.suffix == ".model":
            around = (config.get("add_bos_token", True) is True, config.get("add_eos_token", False) is True)
            backend = PieceTokenizer(content, (), *around, str(file))
            added = _added(config, file.parent, backend.size)
            backend = PieceTokenizer(content, added, *around, str(file)) if added else backend
        else:
            backend = JsonTokenizer(content, str(file))
        names = {**_special_names(file.parent, config, backend), **tokens}
        return cls(backend, **{f"{role}_token": name for role, name in names.items()})

    def encode(self, text: str, add_special: bool = False) -> np.ndarray:
        """Token ids of a text, int32 (T,); `add_special` puts what the model's own format has around it."""
        return self.encode_batch([text], add_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[np.ndarray]:
        """Token ids of each text, a list of int32 (T,)."""
        return [np.array(ids, np.int32) for ids in self.backend.encode(list(texts), add_special)]

    def encode_response(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of responses as they follow a prompt: those of `JOIN` + text, a list of int32 (T,).

        Ids of a prompt, then these, are the ids of prompt + `JOIN` + text. To encode `JOIN` + text alone is
        not the same where a tokenizer puts a space before every text, as LLaMA's does.

        Raises
        ------
        ConfigError
            The tokenizer joins words across a space, so that no such ids exist.
        """
        head = self.backend.encode([_ANCHOR], False)[0]
        whole = self.backend.encode([_ANCHOR + JOIN + text for text in texts], False)
        if any(ids[: len(head)] != head for ids in whole):
            raise ConfigError("the tokenizer joins words across a space; give one that splits text at spaces")
        return [np.array(ids[len(head) :], np.int32) for ids in whole]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Text of token ids (T,).

        Raises
        ------
        ConfigError
            An id is not in the vocabulary.
        """
        numbers = np.asarray(ids, np.int64).reshape(-1).tolist()
        wrong = next((number for number in numbers if not 0 <= number < self.vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"the token id {wrong} is not in the vocabulary of {self.vocab_size:,} tokens; give ids of "
                f"this tokenizer"
            )
        return self.backend.decode(numbers, skip_special)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, or None."""
        return self.backend.id_of(token)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included: the smallest number of rows of an embedding."""
        return self.backend.size

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a text, or None."""
        return self._id(self.bos_token)

    @property
    def eos(self) -> int | None:
        """Id of the token that ends a text, or None."""
        return self._id(self.eos_token)

    @property
    def begin(self) -> np.ndarray:
        """Tokens before every text, int32: the one that begins texts, unless it is the one that ends them."""
        return np.array([self.bos] if self.bos not in (None, self.eos) else [], np.int32)

    @property
    def pad(self) -> int | None:
        """Id of the token that fills a batch, or None."""
        return self._id(self.pad_token)

    @property
    def unk(self) -> int | None:
        """Id of the token of unknown text, or None."""
        return self._id(self.unk_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.id_of(token)

    def add_special(self, tokens: Sequence[str], **roles: str) -> Tokenizer:
        """Return a tokenizer with more special tokens, whose ids follow the last one.

        A token that is in the vocabulary keeps its id. Text that spells a special token becomes that token.

        Parameters
        ----------
        tokens
            Their texts.
        **roles
            `bos`, `eos`, `pad`, `unk`: what some of them are from now on.

        Raises
        ------
        ConfigError
            An empty token, an unknown role, or a role's token that does not exist.
        """
        if isinstance(tokens, str) or not all(isinstance(token, str) and token.strip() for token in tokens):
            raise ConfigError(
                f"the special tokens {tokens!r} are not a list of texts; give one text for each"
            )
        for role in roles:
            check_choice("a special token", role, ROLES)
        names = {f"{role}_token": token for role, token in roles.items()}
        return dataclasses.replace(self, backend=self.backend.add(list(dict.fromkeys(tokens))), **names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of all that decides about ids and text."""
        names = json.dumps([getattr(self, f"{role}_token") for role in ROLES])
        config = json.dumps(self.backend.config(), sort_keys=True)
        parts = (self.backend.file.encode(), self.backend.content(), config.encode(), names.encode())
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json or tokenizer.model, and a tokenizer_config.json that transformers reads too.

        A file of the other kind is removed, because it would be another tokenizer.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        other = MODEL if self.backend.file == JSON else JSON
        (target / other).unlink(missing_ok=True)
        named = {f"{role}_token": getattr(self, f"{role}_token") for role in ROLES}
        config = {**self.backend.config(), **named}
        (target / self.backend.file).write_bytes(self.backend.content())
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (target / _CONFIG).write_text(text + "\n", encoding="utf-8")


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = VOCAB_SIZE,
    special: Sequence[str] = (END, PAD),
    min_frequency: int = 2,
) -> Tokenizer:
    """Train a byte-level BPE on a corpus (Cell2Sentence paper, appendix C.0.1).

    It is of the form of GPT-2's, but for one thing: GPT-2 never has letters and digits, or what stands on both sides of
    a hyphen, in one token, which cuts most names of genes. Here "HLA-DRA" and "RPS9" may become tokens, and a sentence
    is half as long.

    The same texts in any order give the same tokenizer. The special tokens come first, then the 256 bytes.

    Parameters
    ----------
    texts
        Prompts and responses; read once.
    vocab_size
        Tokens at most; a small corpus gives fewer.
    special
        The first one begins and ends texts, the second one, if any, fills batches.
    min_frequency
        Least number of times that a pair must occur to become a token.

    Raises
    ------
    ConfigError
        No special token, or a vocabulary that cannot hold them and all bytes.
    MissingExtraError
        The library `tokenizers` is not installed.
    """
    least = 256 + len(set(special))
    if not special or vocab_size < least:
        raise ConfigError(
            f"the vocabulary is to have {vocab_size} tokens with {len(special)} special ones, expected at least "
            f"{least} with one; give more"
        )
    library = import_tokenizers()
    model = library.Tokenizer(library.models.BPE())
    words = library.pre_tokenizers.Split(library.Regex(_WORDS), "isolated")
    bytes_ = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = library.pre_tokenizers.Sequence([words, bytes_])
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    backend = JsonTokenizer(model.to_str().encode(), "the trained tokenizer")
    return Tokenizer(backend, special[0], special[0], special[1] if len(special) > 1 else None)


def _read(path: Path) -> dict[str, Any]:
    """Content of a JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} ({error}); write it again or remove it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; write it again or remove it")
    return content


def _added(config: dict[str, Any], folder: Path, pieces: int) -> tuple[str, ...]:
    """Tokens that a folder adds behind the pieces of its tokenizer.model, in the order of their ids."""
    decoder = config.get("added_tokens_decoder", {})
    ids = {int(number): token for token, number in _read(folder / _ADDED).items()}
    ids |= {int(number): str(_content(token)) for number, token in decoder.items()}
    beyond = sorted(number for number in ids if number >= pieces)
    if beyond != list(range(pieces, pieces + len(beyond))):
        raise ConfigError(
            f"{folder} adds tokens with the ids {beyond[:3]}... to {pieces:,} pieces, expected ids from {pieces} "
            f"on without a gap; write {_CONFIG} again"
        )
    return tuple(ids[number] for number in beyond)


def _content(token: Any) -> Any:
    """Text of a token that is given as text or as an object with its options."""
    return token.get("content") if isinstance(token, dict) else token


def _special_names(folder: Path, config: dict[str, Any], backend: Backend) -> dict[str, str | None]:
    """Names of the special tokens by role, from the first file that speaks of each; null means none."""
    names: dict[str, str | None] = {}
    for source in (config, _read(folder / _SPECIAL)):
        for role in ROLES:
            if f"{role}_token" in source:
                names.setdefault(role, _content(source[f"{role}_token"]))
    for source in (_read(folder / name) for name in _NAMED_BY_ID):
        for role in ROLES:
            number = source.get(f"{role}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and 0 <= number < backend.size:
                names.setdefault(role, backend.token_of(number))
    return {**backend.roles(), **names}
