"""Ask a ZerOmics model about cells: score candidate answers or generate text (ZerOmics paper, section 3.2)."""

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
from sct.data.cell_options import CellOptions
from sct.data.cell_records import known_genes
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
# Arrays `bins` and, optionally, `genes` of cells; see `sct.data.cell_records.cell_records`.
CellBins = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TextDecoder:
    """The text decoder of a ZerOmics model, with the attributes that text generation needs."""

    config: DecoderConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer

    @functools.cached_property
    def parts(self) -> DecoderParts:
        """Parameters for decoding, prepared once for all questions."""
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
    """An instruction-tuned ZerOmics model, with its prompt templates and data options.

    Attributes
    ----------
    config, variables, tokenizer
        Configuration, variables and tokenizer of the model.
    prompts
        Instruction templates.
    cells
        Options of the conversion from counts to model input.
    known
        Whether the cell model can read each gene, bool (G,).
    normal
        Values of the disease column that mean a normal cell.
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
        """Make an `InstructionModel` from a pretrained model and the options that it was trained with.

        Raises
        ------
        ConfigError
            The model is not instruction-tuned.
        """
        fits = isinstance(config, ZerOmicsConfig) and tokenizer is not None and genes is not None
        if not fits or data.get("task") != TASK:
            raise ConfigError(
                "the model is not tuned on instructions about cells: use a model that was trained with the "
                "task `instructions`, for example with configs/zeromics_llm.py."
            )
        assert tokenizer is not None
        assert genes is not None
        known = known_genes(len(genes), data["dropped"])
        cells = CellOptions.of(config.cells.num_bins, data)
        prompts = Prompts.of_plain(data["prompts"], INSTRUCTIONS)
        return cls(config, variables, tokenizer, prompts, cells, known, frozenset(data["normal"]))

    @functools.cached_property
    def language(self) -> TextDecoder:
        """The text decoder with its adapters."""
        parts = {name: tree["llm"] for name, tree in self.variables.items() if "llm" in tree}
        return TextDecoder(self.config.llm, parts, self.tokenizer)

    def soft(self, records: CellBins, rows: Sequence[int]) -> jax.Array:
        """Compute the soft prompts (n, K, E) that represent the cells in the given rows."""
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
        """Write the prompt for each cell with one template, and return the tokens of each prompt."""
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
        """Compute the log probability of each candidate answer for each cell, normalized over the candidates.

        The answer to the pathway task can list several pathways, so the score of a pathway is the probability that the
        answer starts with this pathway. For all other tasks, the score is the probability of the whole answer.

        Parameters
        ----------
        task
            "cell_type", "rare_cell", "tumor" or "pathway", or the code of the task in the paper.
        records
            Model input of N cells, arrays (N, S).
        abstracts
            Abstract of the study of each cell, N strings.
        candidates
            C different answers.
        keys, seed
            The order of the candidates in a prompt depends on the seed and on the key of the cell. Default keys: 0, 1,
            ...
        templates
            Number of prompt templates to use, or a list of template indices. The probabilities are averaged over these
            templates.
        batch_size
            Number of cells processed at once.
        cells
            For control experiments: for each prompt, the index of the cell whose soft tokens the prompt gets.

        Returns
        -------
        float64 (N, C).

        Raises
        ------
        ConfigError
            There are fewer than two candidates, a candidate is repeated, the name of a pathway starts with the name of
            another one, or a template does not exist.
        """
        task = task_code(task)
        usable = self.prompts.templates[task]
        check_not_empty("candidates", candidates, least=2)
        check_distinct("candidates", candidates)
        begun = sorted(candidates) if task == "cpi" else []
        for name, longer in itertools.pairwise(begun):
            # In sorted order, a name comes directly before the names that start with it.
            if longer.startswith(name):
                raise ConfigError(
                    f"the pathway {longer!r} starts with the name of the pathway {name!r}, so their scores "
                    "cannot be separated: remove one of these two pathways."
                )
        templates = range(templates) if isinstance(templates, int) else templates
        if not templates or not all(0 <= number < len(usable) for number in templates):
            raise ConfigError(
                f"templates is {templates}, but the task {task_name(task)!r} has {len(usable)} templates: give the "
                f"number to use (1 to {len(usable)}), or a list of indices (0 to {len(usable) - 1})."
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
        """Generate the answer to a free-form question about each cell.

        Parameters
        ----------
        question
            The question. In the prompt it follows the abstract and the cell.
        records, abstracts
            See `score`.
        keys, seed
            The random sampling for a cell depends on the seed and on the key of the cell. Default keys: 0, 1, ...
        options
            Decoding options. Default: greedy decoding of up to 64 tokens.

        Returns
        -------
        N answers.
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
        # An untrained model can write null bytes, which HDF5 strings cannot hold.
        return [self.tokenizer.decode(each.ids).replace("\0", "\ufffd").strip() for each in made]
