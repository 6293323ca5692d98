"""Questions about cells to a decoder that learned cell sentences, and what its answers say."""

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
# The choice of the paper (appendix D).
TEMPERATURE, TOP_P = 0.7, 0.9
_TOKENS_PER_WORD = 8  # of a gene's name, more than any tokenizer in use needs on average


@dataclasses.dataclass(frozen=True)
class CellSentenceModel:
    """A decoder with what is needed to ask it about cells.

    Attributes
    ----------
    config, variables, tokenizer
        Of the decoder.
    gene_names
        Word of each gene, in the order of the model's vocabulary (G).
    prompts
        Templates that it was trained with.
    top_k
        Words of a cell sentence at most; 0 for all expressed genes.
    fits
        Line of expression over log rank, by training study, and "all".
    labels
        Values of each label in training, the most frequent first; those of combined labels as "labels".
    tasks
        What it learned, of `sct.data.text.prompts.TASKS`.
    length
        Tokens of the rows that it was trained on.
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
        """Make it of the parts of a model.

        Raises
        ------
        ConfigError
            The model did not learn cell sentences.
        """
        if (
            data.get("task") != TASK
            or tokenizer is None
            or genes is None
            or not isinstance(config, DecoderConfig)
        ):
            raise ConfigError(
                "the model did not learn cell sentences: give one that was trained with the task cell_sentences, such "
                "as by configs/c2s_gpt2.py."
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
        """Raise `ConfigError` unless the model learned a task."""
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
        """Tokens of the question about each cell, and the number of its template."""
        self.check(task)
        keys = range(len(fields)) if keys is None else keys
        asked = [
            self.prompts.ask(task, each, seed=seed, key=int(key), number=number)
            for each, key in zip(fields, keys, strict=True)
        ]
        ids = self.tokenizer.encode_batch([each.prompt for each in asked])
        return [np.concatenate([self.tokenizer.begin, each]) for each in ids], [each.number for each in asked]

    def options(self, task: str, prompts: Sequence[np.ndarray], **changes: Any) -> DecodingOptions:
        """How to generate behind these prompts: as the paper does, with as many tokens as an answer may need.

        Where `max_new_tokens` is not among the changes, question and answer have the length of the rows of training
        together, and a cell no more tokens than its words may need. That holds for rotary models, too, which could
        read on.

        Raises
        ------
        DataError
            A question leaves no room for an answer.
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
                    f"a question has {longest} tokens, but the model learned rows of {row}, questions and answers "
                    "together: ask about fewer genes, or set max_new_tokens."
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
        """Generate an answer to the question of a task about each of N cells.

        Parameters
        ----------
        task
            Of `sct.data.text.prompts.TASKS`.
        fields
            What is known of each cell.
        seed, keys
            Template and draws of a cell follow from the seed and its key; by default keys are 0, 1, ...
        options
            Of `sct.generation.decoding.DecodingOptions`, in place of the paper's.

        Returns
        -------
        Table of N rows: `text`, what was generated; `answer`, what it says, None where it is not of the template's
        form; `finished`, whether it ended by itself; `log_probability`.
        """
        prompts, numbers = self._prompts(task, fields, seed, keys, None)
        keys = range(len(fields)) if keys is None else keys
        # Seeds of their own: 0 and 1 must not share most draws.
        seeds = [int(np.random.SeedSequence([seed, int(key)]).generate_state(1)[0]) for key in keys]
        made = generate(self, prompts, self.options(task, prompts, **options), seeds=seeds)
        # A byte of zero, which an untrained model may write, is no text that a file can hold.
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
        """Log-probabilities of the candidate answers for each cell, normalised over the candidates.

        Parameters
        ----------
        task, fields
            As of `answer`.
        candidates
            Answers to choose among, C different ones.
        templates
            Wordings of the question, the first ones of the task, over which probabilities are averaged.
        batch_size
            Cells at once.

        Returns
        -------
        float64 (N, C).
        """
        check_at_least("templates", templates, 1)
        check_at_least("batch_size", batch_size, 1)
        check_not_empty("candidates", candidates)
        check_distinct("candidates", candidates)
        self.check(task)
        usable = [
            number
            for number, template in enumerate(self.prompts.templates[task])
            if all(template.prompt_fields <= {*each, "genes"} for each in fields)
        ][:templates]
        if not usable:
            raise ConfigError(
                f"no template of the task {task!r} does with what is known of the cells: give more fields."
            )
        end = self.tokenizer.eos
        if end is None:
            raise ConfigError("the tokenizer has no token that ends a text: name one (eos) in its files.")
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
        """Expression log10(1 + counts per 10,000) of sentences (N, G), and what they are made of.

        See `sct.data.text.cell_sentence.expression`.
        """
        return expression(sentences, self.gene_names, self.line(fit))

    def line(self, fit: str) -> RankFit:
        """Line that turns ranks into expression, of a training study or of "all".

        Raises
        ------
        ConfigError
            There is no such study.
        """
        check_choice("fit", fit, self.fits, advice="name a study whose cells the line was fitted to")
        return self.fits[fit]


def _normalized(logs: np.ndarray) -> np.ndarray:
    """Logarithms (N, C) shifted so that the exponentials of a row add up to one."""
    highest = logs.max(axis=1, keepdims=True)
    return logs - highest - np.log(np.exp(logs - highest).sum(axis=1, keepdims=True))
