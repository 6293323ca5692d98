"""Compute gene features (one vector per gene) from a gene corpus by a text decoder, or read them from a file.

In the ZerOmics paper (section 3.1), an item token follows the summary of a gene. The hidden state of a decoder at this
token is the feature of the gene. The ablations in Table 5 of the paper use other gene features (Gene2vec, random
features), or compute cell embeddings from gene features alone (GenePT).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sct import messages
from sct.atomic import atomic_write
from sct.checks import check_at_least, check_distinct, check_one_each
from sct.data.genes.corpus import GeneCorpus, find_genes, suffix_of
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.cell_sentence import normalize
from sct.errors import ConfigError, DataError
from sct.gene_features.files import DELIMITERS, TABLES, named_rows, read_arrays, text_rows
from sct.global_settings import settings
from sct.models.decoder_config import DecoderConfig
from sct.nn.paths import flatten, unflatten
from sct.progress import progress
from sct.weights.pretrained import Pretrained
from sct.weights.vocabulary import resized

ITEM = "<|item|>"
_CACHE = "gene_features"  # sub-folder of `sct.settings.cache_dir`
MAX_TOKENS = 1024  # the longest summary of RefSeq has 3,415 letters
_FORMAT = 1
_STEP = 64  # texts are padded to a multiple of this number, so that XLA compiles few lengths


@dataclasses.dataclass(frozen=True, eq=False)
class GeneFeatures:
    """Hold the feature vectors of G genes.

    Attributes
    ----------
    keys
        Ensembl ids without version, as in `GeneVocabulary.keys`.
    table
        float32 (G, D), one row per gene.
    source
        Origin of the table, with hashes of its inputs, as JSON-compatible values.
    """

    keys: tuple[str, ...]
    table: np.ndarray
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        table = np.asarray(self.table)
        if table.ndim != 2 or len(table) != len(self.keys) or not table.size or table.dtype.kind not in "fiu":
            raise DataError(
                f"the features of {len(self.keys)} genes have the type {table.dtype} and the shape {table.shape}, but "
                "must be numbers of shape (genes, features): give one row per gene, and at least one gene."
            )
        with np.errstate(over="ignore"):
            table = np.ascontiguousarray(table, np.float32)
        object.__setattr__(self, "table", table)
        check_distinct("the list of genes", self.keys, error=DataError, advice="give one row for each")
        bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
        if len(bad):
            raise DataError(
                f"the features of {len(bad)} genes have NaN or infinity in float32 (first: {self.keys[bad[0]]}): "
                "remove these genes, or correct the table."
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"GeneFeatures({len(self):,} genes, {self.size} features, hash {self.hash[:12]})"

    @property
    def size(self) -> int:
        """Return the number of features per gene (D)."""
        return self.table.shape[1]

    @cached_property
    def hash(self) -> str:
        """Return a hash (sha256, hexadecimal) of the keys and the table."""
        digest = hashlib.sha256(json.dumps([self.keys, self.size]).encode())
        digest.update(self.table.data)
        return digest.hexdigest()

    @classmethod
    def encode(
        cls,
        corpus: GeneCorpus,
        model: Pretrained,
        *,
        item: str = ITEM,
        cache: str | os.PathLike[str] | None = None,
        batch_size: int = 16,
        max_tokens: int | None = None,
        progress_bar: bool = True,
    ) -> GeneFeatures:
        """Compute gene features from text with a decoder (ZerOmics paper, section 3.1, equation 3).

        The item token is appended to the text of a gene. The feature is the hidden state at the item token, after the
        last norm. If the tokenizer does not have the item token, the token is added, and
        `sct.weights.vocabulary.resized` initializes its embedding.

        Parameters
        ----------
        corpus
            Texts of G genes.
        model
            Model of the family gpt2, neox or llama with its tokenizer. The computation uses `config.dtype`.
        item
            String of the item token.
        cache
            Folder where computed tables are cached. Default: the folder
            `gene_features` in `sct.settings.cache_dir`; "" disables the cache.
        batch_size
            Number of texts that the model reads at once.
        max_tokens
            Maximum number of tokens per text, including the begin token and the item token. Longer texts are truncated
            before the item token. Default: the number of positions of the model, but at most 1,024.
        progress_bar
            Whether to show a progress bar.

        Returns
        -------
        Features of G genes in the order of the corpus; D is the width of the model. `source["cut"]` is the number of
        truncated texts.

        Raises
        ------
        ConfigError
            The model is not a text decoder, or an option is out of range.
        DataError
            A text contains the item token, or the cache folder cannot be written.

        Warns
        -----
        UserWarning
            Texts were truncated, a cached table is damaged and is computed again, or the new table could not be cached.
        """
        if not isinstance(model.config, DecoderConfig) or model.tokenizer is None:
            raise ConfigError(
                f"{model!r} is not a text decoder with a tokenizer: use a model of the family gpt2, neox or llama."
            )
        most = min(model.config.max_length, MAX_TOKENS) if max_tokens is None else max_tokens
        if model.config.positions == "learned":
            check_at_least(
                "max_tokens",
                most,
                0,
                most=model.config.max_length,
                advice=f"set it to {model.config.max_length} or less, the number of positions of the model",
            )
        check_at_least("batch_size", batch_size, 1)
        inputs = {"corpus": corpus.hash, "model": _identity(model), "item": item, "max_tokens": most}
        folder = settings.cache_dir / _CACHE if cache is None else Path(cache).expanduser()
        kept = None if cache == "" else _place(folder, inputs)
        if kept is not None and (found := _cached(kept, inputs, corpus)) is not None:
            return found
        table, cut = _read(corpus, model, item, most, batch_size, progress_bar)
        about = {"kind": "texts", "corpus_name": corpus.name, "family": model.family, "cut": cut}
        made = cls(corpus.keys, table, {**inputs, **about})
        if kept is not None:
            try:
                made.save(kept)
            except DataError as error:  # a full disk must not lose the result of hours
                messages.warn(f"the gene features are not cached: {error}")
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str], genes: GeneVocabulary | None = None) -> GeneFeatures:
        """Read gene features from a file.

        Gene names are Ensembl ids or symbols. Names are matched in the same way as in `GeneCorpus.load`. Unknown genes
        are dropped; `source["left_out"]` is their number. Files that `save` wrote are loaded without matching.

        Parameters
        ----------
        path
            File in one of these formats:

            - .npz: an array of names (`keys`, `genes` or `symbols`) and an array of rows (`table` or `embeddings`).
            - .txt, .vec or .w2v: a name and its numbers in each line, separated by white space, as in Gene2vec. The
              first line of the word2vec format (number of genes, number of features) is optional.
            - .tsv or .csv: a name and its numbers in each row of a table; the header is optional.

            Text files can be compressed (.gz).
        genes
            Vocabulary in which names are looked up. Default: the human vocabulary of this package.

        Raises
        ------
        DataError
            The file is missing, damaged or has another format, a gene has two rows, a number is not finite, or almost
            no gene is known.
        """
        path = Path(path).expanduser()
        if suffix_of(path) == ".npz":
            arrays = read_arrays(path)
            if "about" in arrays:
                return _own(path, arrays)
            names, table = named_rows(path, arrays)
        elif suffix_of(path) in DELIMITERS:
            names, table = text_rows(path)
        else:
            raise DataError(
                f"{path} has an unknown file format: use a file that ends with one of {', '.join(TABLES)}."
            )
        nameless = [at for at, name in enumerate(names) if not name]
        if not names:
            raise DataError(
                f"{path} has no rows: give one row per gene, with the gene name and its features."
            )
        if nameless:
            raise DataError(
                f"{path} has no gene name in row {nameless[0] + 1}: name this gene, or remove the row."
            )
        genes = GeneVocabulary.human() if genes is None else genes
        at, unknown = find_genes(names, genes, str(path), "row")
        rows = np.flatnonzero(at >= 0)
        rows = rows[np.argsort(at[rows])]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        source = {"kind": "file", "file": path.name, "sha256": digest, "left_out": len(unknown)}
        try:
            return cls(tuple(genes.keys[position] for position in at[rows].tolist()), table[rows], source)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @classmethod
    def random(cls, vocabulary: GeneVocabulary, size: int, seed: int = 0) -> GeneFeatures:
        """Return features (G, size) from a standard normal distribution: a control without information about genes."""
        check_at_least("size", size, 1)
        table = np.random.default_rng(seed).standard_normal((len(vocabulary), size), np.float32)
        source = {"kind": "random", "vocabulary": vocabulary.hash, "seed": seed, "size": size}
        return cls(vocabulary.keys, table, source)

    @classmethod
    def lsa(cls, corpus: GeneCorpus, size: int, seed: int = 0) -> GeneFeatures:
        """Compute gene features by latent semantic analysis of the texts (Deerwester et al. 1990), without a model.

        The features are the leading singular vectors of the TF-IDF matrix of all words that occur in two or more texts.
        Each feature is scaled to variance 1.

        Parameters
        ----------
        corpus
            Texts of G genes.
        size
            Number of features (D). This number must be below the number of texts and below the number of words.
        seed
            Random seed of the singular value decomposition.

        Raises
        ------
        ConfigError
            `size` is too large for the number of texts and words.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(min_df=2, sublinear_tf=True).fit_transform(corpus.texts)
        check_at_least(
            "size",
            size,
            1,
            most=min(words.shape) - 1,
            advice=f"set it lower, because {words.shape[0]:,} texts share only {words.shape[1]:,} words, or add texts",
        )
        table = TruncatedSVD(size, random_state=seed).fit_transform(words)
        table /= np.maximum(table.std(axis=0), 1e-12)
        source = {
            "kind": "lsa",
            "corpus": corpus.hash,
            "corpus_name": corpus.name,
            "seed": seed,
            "size": size,
        }
        return cls(corpus.keys, table.astype(np.float32), source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file that `load` can read. The file appears only when it is complete.

        Raises
        ------
        DataError
            The name does not end with .npz, or the file cannot be written.
        """
        target = Path(path).expanduser()
        if target.suffix != ".npz":
            raise DataError(f"the output file is {target}, but its name must end with .npz: rename it.")
        about = json.dumps(
            {"format": _FORMAT, "hash": self.hash, "source": dict(self.source)}, sort_keys=True
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as temporary, temporary.open("wb") as file:
                np.savez(file, keys=np.array(self.keys), table=self.table, about=np.array(about))
        except OSError as error:
            raise DataError(
                f"{target} cannot be written ({error.strerror or error}): choose another path."
            ) from None

    def of(self, vocabulary: GeneVocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of the genes of a vocabulary, matched by key.

        Returns
        -------
        Two arrays: the features, float32 (G, D), with zeros for genes without features; and a mask of the genes with
        features, bool (G,).

        Raises
        ------
        DataError
            No gene of the vocabulary has features.
        """
        place = {key: at for at, key in enumerate(self.keys)}
        at = np.array([place.get(key, -1) for key in vocabulary.keys])
        has_features = at >= 0
        if not has_features.any():
            raise DataError(
                f"none of the {len(vocabulary):,} genes of {vocabulary.name} has features: use gene features of the "
                "same organism."
            )
        rows = np.zeros((len(at), self.size), np.float32)
        rows[has_features] = self.table[at[has_features]]
        return rows, has_features

    def weighted_cells(self, counts: sparse.csr_matrix, vocabulary: GeneVocabulary) -> np.ndarray:
        """Compute GenePT-w cell embeddings: sums of gene features, weighted by expression.

        The method is from Chen & Zou 2024 ("GenePT: a simple but effective foundation model for genes and cells built
        from ChatGPT"). Counts are normalized to 10,000 per cell. The weight of a gene is log(1 + normalized count). The
        sum is scaled to length 1. This is an ablation in Table 5 of the ZerOmics paper.

        Parameters
        ----------
        counts
            Raw counts (N, G). Genes without features contribute to the total count of the cell, but not to the sum.
        vocabulary
            Genes of the counts.

        Returns
        -------
        float32 (N, D). The embedding of a cell that expresses no gene with features is zero.

        Raises
        ------
        DataError
            Counts are negative or not finite, the number of genes does not match, or no gene has features.
        """
        check_one_each(
            "genes in counts",
            counts.shape[1],
            f"genes in the vocabulary {vocabulary.name}",
            len(vocabulary),
            advice="pass the vocabulary of these counts",
        )
        rows, _ = self.of(vocabulary)
        # `normalize` uses log10; scaling to length 1 removes this constant factor.
        cells = np.asarray(normalize(counts) @ rows, np.float32)
        lengths = np.linalg.norm(cells, axis=1, keepdims=True)
        return np.divide(cells, lengths, out=np.zeros_like(cells), where=lengths > 0)


def _identity(model: Pretrained) -> str:
    """Return a hash of all that determines the model's output: family, configuration, weights and tokenizer."""
    assert model.tokenizer is not None
    config = dataclasses.asdict(model.config)
    parts = [model.family, config, model.fingerprint, model.tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(
    corpus: GeneCorpus, model: Pretrained, item: str, most: int, batch_size: int, progress_bar: bool
) -> tuple[np.ndarray, int]:
    """Return the hidden states at the item tokens, float32 (G, D), and the number of truncated texts."""
    tokens, grown, cut = _tokens(corpus, model, item, most)
    if cut:
        messages.warn(
            f"{cut:,} of {len(corpus):,} texts of {corpus.name} were truncated to {most} tokens: set a larger "
            "max_tokens if the model has enough positions",
        )
    decoder = _in_its_type(grown)
    rows = min(batch_size, len(tokens))
    # The longest texts come first, so that a lack of memory shows at once.
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    table = np.zeros((len(tokens), model.config.embed_dim), np.float32)
    with progress("encoding genes", len(tokens), active=progress_bar) as bar:
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            length = min(-(-len(tokens[chosen[0]]) // _STEP) * _STEP, most)
            ids, last = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
            for row, i in enumerate(chosen):
                ids[row, : len(tokens[i])], last[row] = tokens[i], len(tokens[i]) - 1
            # Right padding needs no mask in a causal model, and flash kernels do not accept one.
            states = decoder.apply(outputs=(), intermediates=("hidden",), input_ids=ids)["hidden"]
            found = np.asarray(states[jnp.arange(rows), last].astype(jnp.float32))
            table[chosen] = found[: len(chosen)]
            bar.update(len(chosen))
    return table, cut


def _tokens(
    corpus: GeneCorpus, model: Pretrained, item: str, most: int
) -> tuple[list[np.ndarray], Pretrained, int]:
    """Tokenize the texts, each followed by the token `item`. If the model lacks this token, add the token to the model.

    Returns
    -------
    Three values: the token ids of each text, the model, and the number of truncated texts.
    """
    assert model.tokenizer is not None
    tokenizer = model.tokenizer.add_special([item])
    end = tokenizer.token_to_id(item)
    assert end is not None
    room = most - len(tokenizer.begin) - 1
    if room < 1:
        raise ConfigError(
            f"max_tokens is {most}, but the special tokens already need {most - room}: set max_tokens to "
            f"{most - room + 1} or more."
        )
    texts = tokenizer.encode_batch(corpus.texts)
    for key, ids in zip(corpus.keys, texts, strict=True):
        if not len(ids) or (ids == end).any():
            what = f"contains the item token {item!r}" if len(ids) else "has no tokens"
            advice = (
                "change the text, or set another item token" if len(ids) else "add a text, or remove the gene"
            )
            raise DataError(f"the text of {key} {what}: {advice}.")
    cut = sum(len(ids) > room for ids in texts)
    made = [np.array([*tokenizer.begin, *ids[:room], end], np.int32) for ids in texts]
    return made, resized(model, tokenizer.vocab_size), cut


def _in_its_type(model: Pretrained) -> Pretrained:
    """Return the model with its matrices in the compute dtype, unless a matrix has a smaller dtype already."""
    kind = jnp.dtype(model.config.dtype)
    arrays = {path: jnp.asarray(leaf) for path, leaf in flatten(model.variables).items()}
    for path, leaf in arrays.items():
        if path.endswith(("/kernel", "/embedding")) and leaf.dtype.itemsize > kind.itemsize:
            arrays[path] = leaf.astype(kind)
    return dataclasses.replace(model, variables=unflatten(arrays))


def _place(folder: Path, inputs: Mapping[str, Any]) -> Path:
    """Return the path of the cache file for the given inputs; create its folder, which must be writable."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Fail now rather than after hours of computing.
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be written ({error.strerror or error}): set cache to another folder, or "
            'cache="" to disable it.'
        ) from None
    return folder / f"{inputs['corpus'][:12]}-{inputs['model'][:12]}-{digest[:12]}.npz"


def _cached(file: Path, inputs: Mapping[str, Any], corpus: GeneCorpus) -> GeneFeatures | None:
    """Return the features in a cache file, or None if the file does not exist or was made from other inputs."""
    if not file.exists():
        return None
    try:
        found = _own(file, read_arrays(file))
        if found.keys != corpus.keys or not inputs.items() <= found.source.items():
            raise DataError(f"{file} was made from other inputs")
    except DataError as error:
        message = f"the gene features are computed again, because the cached file cannot be used: {error}"
        messages.warn(message)
        return None
    return found


def _own(path: Path, arrays: Mapping[str, np.ndarray]) -> GeneFeatures:
    """Read the features from a file that `GeneFeatures.save` wrote."""
    try:
        about = json.loads(str(arrays["about"]))
        form, written = about["format"], about["hash"]
        made = GeneFeatures(tuple(arrays["keys"].tolist()), arrays["table"], about["source"])
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} is not a valid file of GeneFeatures.save ({error}): delete the file and create it again."
        ) from None
    if form != _FORMAT:
        raise DataError(
            f"{path} has the format version {form}, but this version of sct reads {_FORMAT}: create the file again."
        )
    if made.hash != written:
        raise DataError(
            f"{path} was changed after it was written (the hash of its content differs): delete the file and create "
            "it again."
        )
    return made
