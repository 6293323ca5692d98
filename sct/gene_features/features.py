"""Features of genes: what a text decoder makes of a gene corpus, or any other table of a vector per gene.

ZerOmics paper, section 3.1: an item token follows the summary of a gene, and what an autoregressive model has there
stands for the gene. Tables of another origin (Gene2vec, random ones) and cells made of a table alone (GenePT) are the
ablations of its Table 5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sct.atomic import atomic_write
from sct.checks import check_at_least, check_distinct, check_one_each
from sct.data.genes.corpus import GeneCorpus, find_genes, suffix_of
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.cell_sentence import normalize
from sct.errors import ConfigError, DataError
from sct.gene_features.files import DELIMITERS, TABLES, named_rows, read_arrays, text_rows
from sct.models.decoder_config import DecoderConfig
from sct.nn.paths import flatten, unflatten
from sct.progress import progress
from sct.weights.pretrained import Pretrained
from sct.weights.vocabulary import resized

ITEM = "<|item|>"
CACHE = "~/.cache/sct/gene_features"  # beside that of compiled programs
MAX_TOKENS = 1024  # the longest summary of RefSeq has 3,415 letters
_FORMAT = 1
_STEP = 64  # texts are filled up to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class GeneFeatures:
    """A vector for each of some genes.

    Attributes
    ----------
    keys
        Ensembl ids without version, as in `GeneVocabulary.keys`.
    table
        float32 (G, D), one row per gene.
    source
        What the table was made of, with hashes: plain values that JSON can hold.
    """

    keys: tuple[str, ...]
    table: np.ndarray
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        table = np.asarray(self.table)
        if table.ndim != 2 or len(table) != len(self.keys) or not table.size or table.dtype.kind not in "fiu":
            raise DataError(
                f"features of {len(self.keys)} genes are {table.dtype} of shape {table.shape}, expected a row of "
                "numbers for each of at least one gene"
            )
        with np.errstate(over="ignore"):
            table = np.ascontiguousarray(table, np.float32)
        object.__setattr__(self, "table", table)
        check_distinct("the list of genes", self.keys, error=DataError, advice="give one row for each")
        bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
        if len(bad):
            raise DataError(
                f"the features of {len(bad)} genes are not finite in float32, such as those of "
                f"{self.keys[bad[0]]}; leave these genes out or make the table again"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"GeneFeatures({len(self):,} genes, {self.size} features, hash {self.hash[:12]})"

    @property
    def size(self) -> int:
        """Number of features (D)."""
        return self.table.shape[1]

    @cached_property
    def hash(self) -> str:
        """sha256 (hexadecimal) over keys and table."""
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
        """Let a decoder read the text of each gene (ZerOmics paper, section 3.1, equation 3).

        The item token follows the tokens of a text, and the state there behind the last norm is the gene's feature. A
        token that the tokenizer does not have yet is added, and begins as `sct.weights.vocabulary.resized` has it.

        Parameters
        ----------
        corpus
            Texts of G genes.
        model
            Of the family gpt2, neox or llama, with its tokenizer; computed in the type of its configuration.
        item
            Text of the item token.
        cache
            Folder in which tables are kept and found again: by default `~/.cache/sct/gene_features`; "" for none.
        batch_size
            Texts read at once.
        max_tokens
            Tokens of a text at most, with the one that begins texts and the item token; longer texts are cut before
            the item token. By default the model's positions, but no more than 1,024.
        progress_bar
            Whether to show one.

        Returns
        -------
        G rows of the model's width, in the corpus's order. `source["cut"]` is the number of texts that were cut.

        Raises
        ------
        ConfigError
            The model reads no text, or an option is out of range.
        DataError
            A text holds the item token, or the folder cannot be written.

        Warns
        -----
        UserWarning
            Texts were cut; a table in the folder is damaged, and is made again; or the new one could not be kept.
        """
        if not isinstance(model.config, DecoderConfig) or model.tokenizer is None:
            raise ConfigError(
                f"{model!r} is no text decoder with a tokenizer; give a model of the families gpt2, neox or llama"
            )
        most = min(model.config.max_length, MAX_TOKENS) if max_tokens is None else max_tokens
        if model.config.positions == "learned":
            check_at_least(
                "max_tokens",
                most,
                0,
                most=model.config.max_length,
                advice=f"give no more than the model has positions, {model.config.max_length}",
            )
        check_at_least("batch_size", batch_size, 1)
        inputs = {"corpus": corpus.hash, "model": _identity(model), "item": item, "max_tokens": most}
        kept = None if cache == "" else _place(Path(CACHE if cache is None else cache).expanduser(), inputs)
        if kept is not None and (found := _cached(kept, inputs, corpus)) is not None:
            return found
        table, cut = _read(corpus, model, item, most, batch_size, progress_bar)
        about = {"kind": "texts", "corpus_name": corpus.name, "family": model.family, "cut": cut}
        made = cls(corpus.keys, table, {**inputs, **about})
        if kept is not None:
            try:
                made.save(kept)
            except DataError as error:  # a full disk is no reason to lose what took hours
                warnings.warn(f"the features of genes are not kept: {error}", UserWarning, stacklevel=2)
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str], genes: GeneVocabulary | None = None) -> GeneFeatures:
        """Read a table of a vector per gene.

        Names of genes are Ensembl ids or symbols and are resolved as by `GeneCorpus.load`; those that are not
        known are left out and counted in `source["left_out"]`. What `save` wrote is read as it was.

        Parameters
        ----------
        path
            - .npz with an array of names (`keys`, `genes` or `symbols`) and one of rows (`table` or `embeddings`);
            - .txt, .vec or .w2v: a name and its numbers in each line, between white space, as Gene2vec has them, with
              or without the first line of word2vec ("genes features");
            - .tsv or .csv: the same as a table, with or without a header.

            Texts may end with .gz.
        genes
            Table that names are looked up in, by default the shipped human one.

        Raises
        ------
        DataError
            The file is absent, damaged or not of such a form, a gene has two rows, a number is not finite, or hardly
            any gene is known.
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
            raise DataError(f"{path} is none of {', '.join(TABLES)}; give features in one of these forms")
        nameless = [at for at, name in enumerate(names) if not name]
        if nameless or not names:
            what = f"no name in row {nameless[0] + 1}" if nameless else "no rows"
            raise DataError(f"{path} has {what}; give the name of a gene with each row of numbers")
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
        """Normal numbers of mean 0 and variance 1, (G, size): what features say nothing about genes is worth."""
        check_at_least("size", size, 1)
        table = np.random.default_rng(seed).standard_normal((len(vocabulary), size), np.float32)
        source = {"kind": "random", "vocabulary": vocabulary.hash, "seed": seed, "size": size}
        return cls(vocabulary.keys, table, source)

    @classmethod
    def lsa(cls, corpus: GeneCorpus, size: int, seed: int = 0) -> GeneFeatures:
        """Latent semantic analysis of the texts (Deerwester et al. 1990): no model is needed.

        Words that two or more texts have, weighted by their rarity (TF-IDF), and of these the leading singular vectors;
        columns are scaled to variance 1.

        Parameters
        ----------
        corpus
            Texts of G genes.
        size
            Number of features (D), smaller than that of texts and of their words.
        seed
            Of the randomised decomposition.

        Raises
        ------
        ConfigError
            There are not as many texts and words.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(min_df=2, sublinear_tf=True).fit_transform(corpus.texts)
        check_at_least(
            "size",
            size,
            1,
            most=min(words.shape) - 1,
            advice=f"{words.shape[0]:,} texts with {words.shape[1]:,} words that two of them have give no more",
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
        """Write an .npz file that `load` reads; a reader never sees a half-written one.

        Raises
        ------
        DataError
            The name has another ending, or the file cannot be written.
        """
        target = Path(path).expanduser()
        if target.suffix != ".npz":
            raise DataError(f"the features are to be written to {target}; give a name that ends with .npz")
        about = json.dumps(
            {"format": _FORMAT, "hash": self.hash, "source": dict(self.source)}, sort_keys=True
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as temporary, temporary.open("wb") as file:
                np.savez(file, keys=np.array(self.keys), table=self.table, about=np.array(about))
        except OSError as error:
            raise DataError(
                f"cannot write {target} ({error.strerror or error}); give another place"
            ) from None

    def of(self, vocabulary: GeneVocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the genes of a vocabulary, found by their keys.

        Returns
        -------
        float32 (G, D), zeros where a gene has no features; and where it has some, bool (G,).

        Raises
        ------
        DataError
            No gene of the vocabulary has features.
        """
        place = {key: at for at, key in enumerate(self.keys)}
        at = np.array([place.get(key, -1) for key in vocabulary.keys])
        there = at >= 0
        if not there.any():
            raise DataError(
                f"none of the {len(vocabulary):,} genes of {vocabulary.name} has features; give those of genes of the "
                "same organism"
            )
        rows = np.zeros((len(at), self.size), np.float32)
        rows[there] = self.table[at[there]]
        return rows, there

    def weighted_cells(self, counts: sparse.csr_matrix, vocabulary: GeneVocabulary) -> np.ndarray:
        """Cells as sums of the features of their genes, weighted by expression: GenePT-w.

        Chen & Zou 2024 ("GenePT: a simple but effective foundation model for genes and cells built from ChatGPT"):
        counts are divided by their sum in the cell, multiplied by 10,000, and log(1 + x) of them weighs the features;
        the sum is scaled to length 1. An ablation in Table 5 of the ZerOmics paper.

        Parameters
        ----------
        counts
            Raw counts (N, G). Genes without features count in a cell's sum alone.
        vocabulary
            Its genes.

        Returns
        -------
        float32 (N, D); zeros for a cell that expresses no gene with features.

        Raises
        ------
        DataError
            Counts are negative or not finite, of another number of genes, or no gene has features.
        """
        check_one_each(
            "genes in the counts",
            counts.shape[1],
            "genes in the vocabulary",
            len(vocabulary),
            advice=f"give the vocabulary of these counts, which {vocabulary.name} is not",
        )
        rows, _ = self.of(vocabulary)
        # Its logarithms are to the base 10, which the length of 1 makes the same.
        cells = np.asarray(normalize(counts) @ rows, np.float32)
        lengths = np.linalg.norm(cells, axis=1, keepdims=True)
        return np.divide(cells, lengths, out=np.zeros_like(cells), where=lengths > 0)


def _identity(model: Pretrained) -> str:
    """Hash of all that decides what a model makes of a text; weights alone do not."""
    assert model.tokenizer is not None
    config = dataclasses.asdict(model.config)
    parts = [model.family, config, model.fingerprint, model.tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(
    corpus: GeneCorpus, model: Pretrained, item: str, most: int, batch_size: int, progress_bar: bool
) -> tuple[np.ndarray, int]:
    """Item states of all texts, float32 (G, D), and how many texts were cut."""
    tokens, grown, cut = _tokens(corpus, model, item, most)
    if cut:
        warnings.warn(
            f"{cut:,} of {len(corpus):,} texts of {corpus.name} were cut to {most} tokens, and their ends not read: "
            "a larger max_tokens reads more, where the model has positions for it",
            UserWarning,
            stacklevel=3,
        )
    decoder = _in_its_type(grown)
    rows = min(batch_size, len(tokens))
    # The longest first, so that memory runs out at once or never.
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    table = np.zeros((len(tokens), model.config.embed_dim), np.float32)
    with progress("encoding genes", len(tokens), active=progress_bar) as bar:
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            length = min(-(-len(tokens[chosen[0]]) // _STEP) * _STEP, most)
            ids, last = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
            for row, i in enumerate(chosen):
                ids[row, : len(tokens[i])], last[row] = tokens[i], len(tokens[i]) - 1
            # Filled up on the right, where a causal model sees nothing of it: no mask, for flash kernels take none.
            states = decoder.apply(outputs=(), intermediates=("hidden",), input_ids=ids)["hidden"]
            found = np.asarray(states[jnp.arange(rows), last].astype(jnp.float32))
            table[chosen] = found[: len(chosen)]
            bar.update(len(chosen))
    return table, cut


def _tokens(
    corpus: GeneCorpus, model: Pretrained, item: str, most: int
) -> tuple[list[np.ndarray], Pretrained, int]:
    """Tokens of each text with the item token, the model that knows this token, and how many texts were cut."""
    assert model.tokenizer is not None
    tokenizer = model.tokenizer.add_special([item])
    end = tokenizer.token_to_id(item)
    assert end is not None
    room = most - len(tokenizer.begin) - 1
    if room < 1:
        raise ConfigError(
            f"max_tokens is {most}, which leaves no room for a text; give at least {most - room + 1}"
        )
    texts = tokenizer.encode_batch(corpus.texts)
    for key, ids in zip(corpus.keys, texts, strict=True):
        if not len(ids) or (ids == end).any():
            what = f"holds the item token {item!r}" if len(ids) else "has no tokens"
            raise DataError(f"the text of {key} {what}; change the text or name another item token")
    cut = sum(len(ids) > room for ids in texts)
    made = [np.array([*tokenizer.begin, *ids[:room], end], np.int32) for ids in texts]
    return made, resized(model, tokenizer.vocab_size), cut


def _in_its_type(model: Pretrained) -> Pretrained:
    """Model whose matrices are converted to the type of its computation once, where that is the smaller one."""
    kind = jnp.dtype(model.config.dtype)
    arrays = {path: jnp.asarray(leaf) for path, leaf in flatten(model.variables).items()}
    for path, leaf in arrays.items():
        if path.endswith(("/kernel", "/embedding")) and leaf.dtype.itemsize > kind.itemsize:
            arrays[path] = leaf.astype(kind)
    return dataclasses.replace(model, variables=unflatten(arrays))


def _place(folder: Path, inputs: Mapping[str, Any]) -> Path:
    """File of a folder for the table of some inputs; the folder is made, and can be written."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Now, and not after hours of computing.
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"cannot keep features of genes in {folder} ({error.strerror or error}); give another folder with cache=, "
            'or cache="" for none'
        ) from None
    return folder / f"{inputs['corpus'][:12]}-{inputs['model'][:12]}-{digest[:12]}.npz"


def _cached(file: Path, inputs: Mapping[str, Any], corpus: GeneCorpus) -> GeneFeatures | None:
    """Table that a file holds if it was made of these inputs."""
    if not file.exists():
        return None
    try:
        found = _own(file, read_arrays(file))
        if found.keys != corpus.keys or not inputs.items() <= found.source.items():
            raise DataError(f"{file} was made of other inputs; make it again")
    except DataError as error:
        warnings.warn(f"{error}: the features of genes are computed anew", UserWarning, stacklevel=3)
        return None
    return found


def _own(path: Path, arrays: Mapping[str, np.ndarray]) -> GeneFeatures:
    """Features as `GeneFeatures.save` wrote them."""
    try:
        about = json.loads(str(arrays["about"]))
        form, written = about["format"], about["hash"]
        made = GeneFeatures(tuple(arrays["keys"].tolist()), arrays["table"], about["source"])
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no file of GeneFeatures.save ({error}); make it again") from None
    if form != _FORMAT:
        raise DataError(f"{path} has the format {form}, expected {_FORMAT}; make it again with this version")
    if made.hash != written:
        raise DataError(f"{path} was changed after it was written (another hash of its table); make it again")
    return made
