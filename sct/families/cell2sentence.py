"""Define the family Cell2Sentence: language models that read and write cells as ranked lists of gene names."""

from __future__ import annotations

from pathlib import Path

from sct.data.genes.vocabulary import GeneVocabulary
from sct.families.manifest import Converter, Family, FamilyModel
from sct.inference.answers import SentenceAnnotator
from sct.inference.gene_vectors import TokenVectors
from sct.inference.sentences import SentenceReader, cell_sentence_model_of
from sct.models import registry
from sct.models.adapter_kinds import CONFIGS
from sct.tasks import cell_sentences
from sct.tasks.finetuning import FineTuning
from sct.weights.hf import folder as hf


def _convert(source: Path, target: Path, dtype: str, genes: GeneVocabulary | None, numbered: bool) -> None:
    hf.convert(source, target, dtype=dtype)


# One converter serves all Hugging Face text models, in every family.
HUGGING_FACE = Converter(
    _convert,
    lambda model, target, dtype: hf.save(model, target, dtype=dtype),
    hf.NOTICE,
    title="Hugging Face",
    weights="GPT-2, GPT-NeoX (Pythia), LLaMA and BERT models of Hugging Face",
    files="DIR contains `config.json`, which names the architecture, and the weights: `model.safetensors`, or several "
    "safetensors files with an index. With the extra `torch` of sct, `pytorch_model.bin` also works. If DIR contains a "
    "tokenizer, it is copied. `sct.load` can also read such a folder without conversion.",
)


def _decoder(name: str, config: str) -> FamilyModel:
    return FamilyModel(
        registry.MODELS[name],
        tasks=(cell_sentences.SPEC,),
        config=config,
        adapters=CONFIGS,
        embed=SentenceReader,
        embed_genes=TokenVectors,
        annotate=SentenceAnnotator,
        generate=cell_sentence_model_of,
        describe=cell_sentence_model_of,
        finetune=FineTuning(),  # tokens are parts of gene names, so there is no gene embedding
    )


FAMILY = Family(
    name="cell2sentence",
    title="A language model reads cells as sentences of gene names, and generates, labels and describes cells",
    paper="Cell2Sentence: teaching large language models the language of biology (ICML 2024)",
    guide="docs/cell_sentences.md",
    license=hf.NOTICE,
    models={
        "gpt2": _decoder("gpt2", "configs/c2s_gpt2.py"),
        "neox": _decoder("neox", "configs/c2s_pythia.py"),
        "llama": _decoder("llama", ""),
    },
    converters={"hf": HUGGING_FACE},
)
