"""Prompt a decoder that was trained on cell sentences, and parse its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least, check_choice, check_distinct, check_not_empty
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.cell_sentence import RankFit, expression
from sct.data.text.prompts import TASKS, Prompts
from sct.data.text.source import sentence_gene_names
from sct.data.text.tokenizer import Tokenizer
from sct.errors import ConfigError, DataError
from sct.generation.decoding import DecodingOptions
from sct.generation.generate import generate
from sct.generation.scoring import score
from sct.models.decoder_config import DecoderConfig

TASK = "cell_sentences"
MAX_LABELS = 1000  # a column with more distinct values is treated as free text, not as a label
# Values of the Cell2Sentence paper (appendix D).
TEMPERATURE, TOP_P = 0.7, 0.9
_TOKENS_PER_WORD = 8  # per gene name; more than any supported tokenizer needs on average


@dataclasses.dataclass(frozen=True)
class CellSentenceModel:
    """A decoder trained on cell sentences, with its prompt templates and training metadata.

    Attributes
    ----------
    config, variables, tokenizer
        Configuration, variables and tokenizer of the decoder.
    gene_names
        Name of each gene in sentences, in the order of the vocabulary (G).
    prompts
        Prompt templates from training.
    top_k
        Maximum number of genes in a cell sentence; 0 for all expressed genes.
    fits
        Dict of linear fits of expression against log rank. Each training study has its own fit, and the key "all" holds
        a fit over all studies together.
    labels
        Dict from each label name to the values of this label in the training data, most frequent first. The key
        "labels" holds the combinations of labels.
    tasks
        Tasks that the model was trained on, from `sct.data.text.prompts.TASKS`.
    length
        Length of training texts in tokens; prompt and answer together have at most this length.
    """

    config: DecoderConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer
    gene_names: tuple[str, ...]
    prompts: Prompts
    top_k: int
    fits: Mapping[str, RankFit]
    labels: Mapping[str, Sequence[str]]
    tasks: tuple[str, ...]
    length: int

    @classmethod
    def of(
        cls,
        config: Any,
        variables: dict[str, Any],
        tokenizer: Tokenizer | None,
        genes: GeneVocabulary | None,
        data: Mapping[str, Any],
    ) -> CellSentenceModel:
        """Make a `CellSentenceModel` from a pretrained model and the options that it was trained with.

        Raises
        ------
        ConfigError
            The model was not trained on cell sentences.
        """
        if (
            data.get("task") != TASK
            or tokenizer is None
            or genes is None
            or not isinstance(config, DecoderConfig)
        ):
            raise ConfigError(
                "the model was not trained on cell sentences: use a model that was trained with the task "
                "cell_sentences, for example with configs/c2s_gpt2.py."
            )
        fits = {name: RankFit(**fit) for name, fit in data["fits"].items()}
        return cls(
            config,
            variables,
            tokenizer,
            sentence_gene_names(genes),
            Prompts.of_plain(data["prompts"]),
            data["top_k"], fits, data["labels"],
            tuple(data["tasks"]), int(data["length"]),
        )  # fmt: skip

    def check(self, task: str) -> None:
        """Raise `ConfigError` if the model was not trained on the given task."""
        check_choice(
            "the task",
            task,
            self.tasks,
            advice="choose one that the model learned, or train a model with this task (--config.objective.tasks)",
        )

    def _prompts(
        self,
        task: str,
        fields: Sequence[Mapping[str, Any]],
        seed: int,
        keys: Sequence[int] | None,
        number: int | None,
    ) -> tuple[list[np.ndarray], list[int]]:
        """Write the prompt for each cell; return the tokens of each prompt and the number of its template."""
        self.check(task)
        keys = range(len(fields)) if keys is None else keys
        asked = [
            self.prompts.ask(task, each, seed=seed, key=int(key), number=number)
            for each, key in zip(fields, keys, strict=True)
        ]
        ids = self.tokenizer.encode_batch([each.prompt for each in asked])
        return [np.concatenate([self.tokenizer.begin, each]) for each in ids], [each.number for each in asked]

    def options(self, task: str, prompts: Sequence[np.ndarray], **changes: Any) -> DecodingOptions:
        """Return the decoding options for prompts: the paper's defaults, with the options in `changes` replaced.

        By default, a prompt and its answer together have at most as many tokens as a training text. This limit also
        holds for models with rotary positions, although these could read longer texts. A generated cell has at most 8
        tokens per gene.

        Raises
        ------
        DataError
            A prompt leaves no room for an answer.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("temperature", TEMPERATURE) > 0 and given.get("beams", 1) == 1:
            given = {"temperature": TEMPERATURE, "top_p": TOP_P, **given}
        if "max_new_tokens" not in given:
            row = self.length
            if self.config.positions == "learned":
                row = min(row, self.config.max_length)
            longest = max(map(len, prompts), default=0)
            if longest >= row:
                raise DataError(
                    f"a prompt has {longest} tokens, but prompt and answer together must have at most {row} tokens, "
                    "as in training: use fewer genes per cell, or set `max_new_tokens` to allow longer texts than in "
                    "training."
                )
            given["max_new_tokens"] = row - longest
            if TASKS[task].answer == "cell":
                words = self.top_k or len(self.gene_names)
                given["max_new_tokens"] = min(_TOKENS_PER_WORD * words, row - longest)
        return DecodingOptions(**given)

    def answer(
        self,
        task: str,
        fields: Sequence[Mapping[str, Any]],
        *,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Generate the answer to a task for each of N cells.

        Parameters
        ----------
        task
            Task from `sct.data.text.prompts.TASKS`.
        fields
            Values for the fields of the prompt templates, one mapping per cell.
        seed, keys
            For each cell, the choice of the template and the random sampling depend on the seed and on the key of the
            cell. Default keys: 0, 1, ...
        options
            Fields of `sct.generation.decoding.DecodingOptions` that override the paper's defaults.

        Returns
        -------
        Table of N rows: `text` (generated text), `answer` (parsed answer; None if the text does not match the
        template), `finished` (whether the model ended the text itself) and `log_probability`.
        """
        prompts, numbers = self._prompts(task, fields, seed, keys, None)
        keys = range(len(fields)) if keys is None else keys
        # With seed + key, the seeds 0 and 1 would share most random samples.
        seeds = [int(np.random.SeedSequence([seed, int(key)]).generate_state(1)[0]) for key in keys]
        made = generate(self, prompts, self.options(task, prompts, **options), seeds=seeds)
        # An untrained model can write null bytes, which HDF5 strings cannot hold.
        texts = [self.tokenizer.decode(each.ids).replace("\0", "\ufffd").strip() for each in made]
        found = [self.prompts.parse(task, number, text) for number, text in zip(numbers, texts, strict=True)]
        return pd.DataFrame(
            {
                "text": pd.Series(texts, dtype=object),
                "answer": pd.Series(found, dtype=object),
                "finished": [each.finished for each in made],
                "log_probability": [each.log_probability for each in made],
            }
        )

    def score(
        self,
        task: str,
        fields: Sequence[Mapping[str, Any]],
        candidates: Sequence[str],
        *,
        templates: int = 1,
        batch_size: int = 8,
    ) -> np.ndarray:
        """Compute the log probability of each candidate answer for each cell, normalized over the candidates.

        Parameters
        ----------
        task, fields
            See `answer`.
        candidates
            C different answers.
        templates
            Number of prompt templates over which the probabilities are averaged.
        batch_size
            Number of cells processed at once.

        Returns
        -------
        float64 (N, C).

        Raises
        ------
        ConfigError
            No template fits the fields, the tokenizer has no end token, or the candidates are empty or repeated.
        """
        check_at_least("templates", templates, 1)
        check_at_least("batch_size", batch_size, 1)
        check_not_empty("candidates", candidates)
        check_distinct("candidates", candidates)
        self.check(task)
        lacking = [
            {name for each in fields for name in template.prompt_fields - {*each, "genes"}}
            for template in self.prompts.templates[task]
        ]
        usable = [number for number, names in enumerate(lacking) if not names][:templates]
        if not usable:
            fewest = min(lacking, key=len)
            raise ConfigError(
                f"no prompt template of the task {task!r} can be used for all cells, because some cells have no value "
                f"for {', '.join(sorted(fewest))}: add these values for all cells."
            )
        end = self.tokenizer.eos
        if end is None:
            raise ConfigError(
                "the tokenizer has no end token, but generation needs one: set `eos_token` in "
                "the tokenizer files."
            )
        total = np.zeros((len(fields), len(candidates)))
        for number in usable:
            prompts, _ = self._prompts(task, fields, 0, None, number)
            responses = [self.prompts.response_for(task, number, each) for each in candidates]
            answers = [np.append(ids, end) for ids in self.tokenizer.encode_response(responses)]
            found = score(self, prompts, answers, batch_size=batch_size).astype(np.float64)
            total += np.exp(_normalized(found)) / len(usable)
        return _normalized(np.log(np.maximum(total, 1e-300)))

    def expression(
        self, sentences: Sequence[str], fit: str = "all"
    ) -> tuple[sparse.csr_matrix, pd.DataFrame]:
        """Convert sentences to expression log10(1 + counts per 10,000) (N, G), and count their valid genes.

        See `sct.data.text.cell_sentence.expression`.
        """
        return expression(sentences, self.gene_names, self.line(fit))

    def line(self, fit: str) -> RankFit:
        """Return the linear fit that converts gene ranks to expression, for one training study or for all ("all").

        Raises
        ------
        ConfigError
            The study does not exist.
        """
        check_choice("fit", fit, self.fits, advice='choose a training study or "all"')
        return self.fits[fit]


def _normalized(logs: np.ndarray) -> np.ndarray:
    """Normalize log probabilities (N, C) per row, so that the C probabilities of a row sum to 1."""
    highest = logs.max(axis=1, keepdims=True)
    return logs - highest - np.log(np.exp(logs - highest).sum(axis=1, keepdims=True))
