"""Asking a ZerOmics model about cells: probabilities of candidate answers, or free text (ZerOmics, section 3.2)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from sct.checks import check_distinct, check_not_empty
from sct.data.cell_records import CellOptions, known_genes
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.instructions import MARK, fields_of, questions_of
from sct.data.text.prompts import INSTRUCTIONS, Prompts, task_code, task_name
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError
from sct.generation.decoding import DecoderParts, DecodingOptions, made_parts
from sct.generation.generate import generate
from sct.generation.scoring import score
from sct.models.decoder_config import DecoderConfig
from sct.models.zeromics import ZerOmics, ZerOmicsConfig

TASK = "instructions"
CellBins = Mapping[
    str, np.ndarray
]  # `bins` and maybe `genes` of cells, see `sct.data.cell_records.cell_records`


@dataclasses.dataclass(frozen=True)
class TextDecoder:
    """The decoder of a model, for generation."""

    config: DecoderConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer

    @functools.cached_property
    def parts(self) -> DecoderParts:
        """Parameters as generation takes them, made once for all questions."""
        return made_parts(self.config, self.variables)


@functools.lru_cache(maxsize=8)
def _soft(config: ZerOmicsConfig) -> Any:
    module = ZerOmics(config)

    def soft(variables: dict[str, Any], bins: jax.Array, genes: jax.Array | None) -> jax.Array:
        encoded = module.apply(variables, bins, genes, method="encode")
        return cast(jax.Array, module.apply(variables, encoded, genes, method="soft"))

    return jax.jit(soft)


@dataclasses.dataclass(frozen=True)
class InstructionModel:
    """A ZerOmics model that is ready to be asked.

    Attributes
    ----------
    config, variables, tokenizer
        Of the model.
    prompts
        Templates of instructions.
    cells
        How cells become records.
    known
        Genes that the cell model knows, bool (G,).
    normal
        Names that mean a normal cell.
    """

    config: ZerOmicsConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer
    prompts: Prompts
    cells: CellOptions
    known: np.ndarray
    normal: frozenset[str]

    @classmethod
    def of(
        cls,
        config: Any,
        variables: dict[str, Any],
        tokenizer: Tokenizer | None,
        genes: GeneVocabulary | None,
        data: Mapping[str, Any],
    ) -> InstructionModel:
        """Make it of the parts of a model.

        Raises
        ------
        ConfigError
            The model did not learn to answer instructions.
        """
        fits = isinstance(config, ZerOmicsConfig) and tokenizer is not None and genes is not None
        if not fits or data.get("task") != TASK:
            raise ConfigError(
                "the model did not learn to answer instructions about cells: give one that was trained with the task "
                "instructions, such as by configs/zeromics_llm.py."
            )
        assert tokenizer is not None
        assert genes is not None
        known = known_genes(len(genes), data["dropped"])
        cells = CellOptions.of(config.cells.num_bins, data)
        prompts = Prompts.of_plain(data["prompts"], INSTRUCTIONS)
        return cls(config, variables, tokenizer, prompts, cells, known, frozenset(data["normal"]))

    @functools.cached_property
    def language(self) -> TextDecoder:
        """The decoder with its adapters."""
        parts = {name: tree["llm"] for name, tree in self.variables.items() if "llm" in tree}
        return TextDecoder(self.config.llm, parts, self.tokenizer)

    def soft(self, records: CellBins, rows: Sequence[int]) -> jax.Array:
        """Soft tokens (n, K, E) of some of the cells."""
        chosen = {
            name: jnp.asarray(value[list(rows)])
            for name, value in records.items()
            if name in ("bins", "genes")
        }
        return cast(jax.Array, _soft(self.config)(self.variables, chosen["bins"], chosen.get("genes")))

    def _questions(
        self,
        task: str,
        number: int,
        abstracts: Sequence[str],
        candidates: Sequence[str],
        keys: Sequence[int],
        seed: int,
    ) -> list[np.ndarray]:
        """Tokens of the question of a template about each cell."""
        asked = [
            self.prompts.ask(
                task, fields_of(task, abstract, candidates, (seed, int(key), 0, 1)), number=number
            )
            for abstract, key in zip(abstracts, keys, strict=True)
        ]
        return questions_of([each.prompt for each in asked], self.tokenizer, self.config.num_soft)

    def score(
        self,
        task: str,
        records: CellBins,
        abstracts: Sequence[str],
        candidates: Sequence[str],
        *,
        keys: Sequence[int] | None = None,
        seed: int = 0,
        templates: int | Sequence[int] = 1,
        batch_size: int = 8,
        cells: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Log-probabilities of the candidate answers for each cell, normalised over the candidates.

        Those of pathways, of which an answer may list several, are of answers that begin with a pathway; those of other
        tasks are of whole answers.

        Parameters
        ----------
        task
            "cell_type", "rare_cell", "tumor" or "pathway", or the code of the paper.
        records
            Cells (N, S).
        abstracts
            What is said of the study of each cell, N texts.
        candidates
            Answers to choose among, C different ones.
        keys, seed
            The order in which a question lists the candidates follows from the seed and the cell's key (0, 1, ...).
        templates
            Wordings of the question over which probabilities are averaged: so many, the first ones, or their numbers.
        batch_size
            Cells at once.
        cells
            Instead of its own, the cell that each question is given (a control).

        Returns
        -------
        float64 (N, C).

        Raises
        ------
        ConfigError
            Candidates stand twice, there are fewer than two, or the name of a pathway begins that of another.
        """
        task = task_code(task)
        usable = self.prompts.templates[task]
        check_not_empty("candidates", candidates, least=2)
        check_distinct("candidates", candidates)
        begun = sorted(candidates) if task == "cpi" else []
        for name, longer in itertools.pairwise(begun):
            # Sorted, a name stands before those that it begins.
            if longer.startswith(name):
                raise ConfigError(
                    f"{name!r} begins {longer!r}, so that answers with one are answers with both: leave one out."
                )
        templates = range(templates) if isinstance(templates, int) else templates
        if not templates or not all(0 <= number < len(usable) for number in templates):
            raise ConfigError(
                f"templates is {templates}, but 1 to {len(usable)} are there for the task {task_name(task)!r}."
            )
        keys = range(len(abstracts)) if keys is None else keys
        given = range(len(abstracts)) if cells is None else cells
        total: np.ndarray | float = 0.0
        for number in templates:
            questions = self._questions(task, number, abstracts, candidates, keys, seed)
            responses = [self.prompts.response_for(task, number, each) for each in candidates]
            end = np.array([] if task == "cpi" else [self.tokenizer.eos], np.int64)
            answers = [np.append(ids, end) for ids in self.tokenizer.encode_response(responses)]
            logs = score(
                self.language, questions, answers, batch_size=batch_size,
                soft=lambda numbers: self.soft(records, [given[i] for i in numbers]),
            ).astype(np.float64)  # fmt: skip
            logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)
            total = total + np.exp(logs) / len(templates)
        return np.log(np.maximum(total, 1e-300))

    def ask(
        self,
        question: str,
        records: CellBins,
        abstracts: Sequence[str],
        *,
        keys: Sequence[int] | None = None,
        seed: int = 0,
        options: DecodingOptions | None = None,
    ) -> list[str]:
        """Free text about each cell.

        Parameters
        ----------
        question
            What is asked, behind the cell and what is said of its study.
        records, abstracts, keys
            As of `score`; draws of a cell follow from the seed and its key.
        options
            How to generate, by default the best token each time.

        Returns
        -------
        N texts.
        """
        keys = range(len(abstracts)) if keys is None else keys
        asked = [
            f"Study: {abstract.strip()}\nCell: {MARK}\nTask: {question.strip()}" for abstract in abstracts
        ]
        prompts = questions_of(asked, self.tokenizer, self.config.num_soft)
        seeds = [int(np.random.SeedSequence([seed, int(key)]).generate_state(1)[0]) for key in keys]
        made = generate(
            self.language, prompts, options or DecodingOptions(max_new_tokens=64), seeds=seeds,
            soft=lambda numbers: self.soft(records, numbers),
        )  # fmt: skip
        # A byte of zero, which an untrained model may write, is no text that a file can hold.
        return [self.tokenizer.decode(each.ids).replace("\0", "\ufffd").strip() for each in made]
