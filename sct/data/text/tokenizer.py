"""Provide one tokenizer class for the libraries `tokenizers` and `sentencepiece`.

`tokenizers` reads a tokenizer.json, and `sentencepiece` reads a tokenizer.model. The libraries do all splitting and
joining of text. Token ids are therefore the same as in `transformers` for the same folder.
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

from sct.checks import check_at_least, check_choice, check_not_empty
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
# Other files of a tokenizer folder that define its special tokens.
_ADDED, _SPECIAL = "added_tokens.json", "special_tokens_map.json"
_NAMED_BY_ID = ("generation_config.json", "config.json")
# All files that `Tokenizer.load` reads.
FILES = (JSON, MODEL, _CONFIG, _ADDED, _SPECIAL, *_NAMED_BY_ID)
_ANCHOR = ":"
# BPE never merges across these units: words with their leading space (which may contain '-', '.' or '/'), other
# characters, and white space.
_WORDS = r" ?\w+(?:[-./]\w+)*| ?[^\s\w]+|\s+"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Convert text to token ids and back.

    Attributes
    ----------
    backend
        Tokenizer object of the library. Do not call it directly; use the methods of this class.
    bos_token, eos_token, pad_token, unk_token
        The special tokens, or None.
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
                    f"the {role} token {token!r} is not in the vocabulary of {self.backend.size:,} tokens: use a token "
                    "of the vocabulary, or None."
                )

    def __repr__(self) -> str:
        return f"Tokenizer({self.backend.file}, {self.vocab_size:,} tokens, {self.fingerprint[:12]})"

    @classmethod
    def load(cls, path: str | os.PathLike[str], **tokens: str | None) -> Tokenizer:
        """Load a tokenizer.json, a tokenizer.model, or a folder with one of them (tokenizer.json is preferred).

        The special tokens are taken from the first of these files that defines them: tokenizer_config.json,
        special_tokens_map.json, generation_config.json, config.json, and the tokenizer file itself.

        Parameters
        ----------
        path
            File or folder.
        **tokens
            `bos`, `eos`, `pad`, `unk`: special tokens to use instead of those in the files.

        Raises
        ------
        ConfigError
            The file does not exist or cannot be read, or a special token is not in the vocabulary.
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
                f"there is neither {JSON} nor {MODEL} at {path}: give one of these files, or a folder that contains "
                "one."
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
        """Return the token ids of a text, int32 (T,). `add_special` adds the tokenizer's special tokens."""
        return self.encode_batch([text], add_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[np.ndarray]:
        """Return the token ids of each text, a list of int32 (T,)."""
        return [np.array(ids, np.int32) for ids in self.backend.encode(list(texts), add_special)]

    def encode_response(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of responses that follow a prompt, a list of int32 (T,).

        The ids of a prompt followed by these ids equal the ids of prompt + `JOIN` + response. Encoding `JOIN` +
        response with `encode` gives other ids for tokenizers that add a space before every text, such as LLaMA's
        tokenizer.

        Raises
        ------
        ConfigError
            The tokenizer merges words across a space, so prompt and response cannot be tokenized separately.
        """
        head = self.backend.encode([_ANCHOR], False)[0]
        whole = self.backend.encode([_ANCHOR + JOIN + text for text in texts], False)
        if any(ids[: len(head)] != head for ids in whole):
            raise ConfigError(
                "the tokenizer merges words across a space, so prompt and response cannot be tokenized separately: "
                "use a tokenizer that splits text at spaces."
            )
        return [np.array(ids[len(head) :], np.int32) for ids in whole]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Return the text of token ids (T,). `skip_special` leaves out special tokens.

        Raises
        ------
        ConfigError
            An id is not in the vocabulary.
        """
        numbers = np.asarray(ids, np.int64).reshape(-1).tolist()
        wrong = next((number for number in numbers if not 0 <= number < self.vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"the token id {wrong} is not in the vocabulary of {self.vocab_size:,} tokens: use ids of this "
                "tokenizer."
            )
        return self.backend.decode(numbers, skip_special)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if the token is not in the vocabulary."""
        return self.backend.id_of(token)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, including added tokens. An embedding table needs at least this many rows."""
        return self.backend.size

    @property
    def bos(self) -> int | None:
        """Return the id of the beginning-of-text token, or None."""
        return self._id(self.bos_token)

    @property
    def eos(self) -> int | None:
        """Return the id of the end-of-text token, or None."""
        return self._id(self.eos_token)

    @property
    def begin(self) -> np.ndarray:
        """Return the ids to put before every text, int32: the id of BOS.

        The array is empty if there is no BOS token, or if the BOS token equals the EOS token.
        """
        return np.array([self.bos] if self.bos not in (None, self.eos) else [], np.int32)

    @property
    def pad(self) -> int | None:
        """Return the id of the padding token, or None."""
        return self._id(self.pad_token)

    @property
    def unk(self) -> int | None:
        """Return the id of the token for unknown text, or None."""
        return self._id(self.unk_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.id_of(token)

    def add_special(self, tokens: Sequence[str], **roles: str) -> Tokenizer:
        """Return a tokenizer with additional special tokens. Their ids follow the last existing id.

        A token that is already in the vocabulary keeps its id. Text that equals a special token is encoded as this
        token.

        Parameters
        ----------
        tokens
            The new special tokens.
        **roles
            `bos`, `eos`, `pad`, `unk`: special tokens to use from now on.

        Raises
        ------
        ConfigError
            A token is empty, a role is unknown, or the token of a role is not in the vocabulary.
        """
        if isinstance(tokens, str) or not all(isinstance(token, str) and token.strip() for token in tokens):
            raise ConfigError(
                f"the special tokens are {tokens!r}, but must be a list of non-empty strings: give one string per "
                "token."
            )
        for role in roles:
            check_choice("a special token", role, ROLES)
        names = {f"{role}_token": token for role, token in roles.items()}
        return dataclasses.replace(self, backend=self.backend.add(list(dict.fromkeys(tokens))), **names)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash (sha256, hexadecimal) of everything that determines token ids and text."""
        names = json.dumps([getattr(self, f"{role}_token") for role in ROLES])
        config = json.dumps(self.backend.config(), sort_keys=True)
        parts = (self.backend.file.encode(), self.backend.content(), config.encode(), names.encode())
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json or tokenizer.model, and a tokenizer_config.json that `transformers` also reads.

        If the folder has a tokenizer file of the other kind, this file is deleted, because it would define another
        tokenizer.
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
    """Train a byte-level BPE tokenizer on a corpus (Cell2Sentence paper, appendix C.0.1).

    The tokenizer differs from GPT-2's tokenizer in one point. GPT-2 never merges letters with digits or across a
    hyphen, which splits most gene names. In this tokenizer, "HLA-DRA" and "RPS9" can become single tokens, and a cell
    sentence has half as many tokens as with GPT-2's tokenizer.

    The order of the texts does not change the result. The special tokens have the first ids, followed by the 256 bytes.

    Parameters
    ----------
    texts
        Prompts and responses. The iterable is read once.
    vocab_size
        Maximal number of tokens. A small corpus gives fewer tokens.
    special
        Special tokens. The first one is BOS and EOS; the second one, if given, is the padding token.
    min_frequency
        A pair of tokens is merged into one token only if it occurs at least this many times.

    Returns
    -------
    The trained tokenizer.

    Raises
    ------
    ConfigError
        There is no special token, or `vocab_size` is too small for the special tokens and the 256 bytes.
    MissingExtraError
        The library `tokenizers` is not installed.
    """
    least = 256 + len(set(special))
    check_not_empty("special", special, advice="give a special token, such as '<|endoftext|>'")
    check_at_least(
        "vocab_size",
        vocab_size,
        least,
        advice=(f"set it to {least} or more, which is 256 bytes and {least - 256} special tokens"),
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
    """Return the content of a JSON file, or an empty dict if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): restore it from a copy, or delete it.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object: restore it from a copy, or delete it.")
    return content


def _added(config: dict[str, Any], folder: Path, pieces: int) -> tuple[str, ...]:
    """Return the tokens that a folder adds to the tokens of its tokenizer.model, in the order of their ids."""
    decoder = config.get("added_tokens_decoder", {})
    ids = {int(number): token for token, number in _read(folder / _ADDED).items()}
    ids |= {int(number): str(_content(token)) for number, token in decoder.items()}
    beyond = sorted(number for number in ids if number >= pieces)
    if beyond != list(range(pieces, pieces + len(beyond))):
        raise ConfigError(
            f"{folder} adds tokens with the ids {', '.join(map(str, beyond[:3]))}..., but the ids must be consecutive "
            f"and start at {pieces}, the number of tokens of {MODEL}: correct {_CONFIG}."
        )
    return tuple(ids[number] for number in beyond)


def _content(token: Any) -> Any:
    """Return the text of a token, which may be given as a string or as an object with options."""
    return token.get("content") if isinstance(token, dict) else token


def _special_names(folder: Path, config: dict[str, Any], backend: Backend) -> dict[str, str | None]:
    """Return a dict from each role to its special token, taken from the first file that defines the role.

    A null entry in a file means that there is no token for this role.
    """
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
