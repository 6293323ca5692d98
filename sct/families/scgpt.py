"""Define the family scGPT: a transformer that reads the genes of a cell as tokens with expression values."""

from __future__ import annotations

from pathlib import Path

from sct.data.genes.vocabulary import GeneVocabulary
from sct.families.manifest import Converter, Family, FamilyModel
from sct.inference.token_cells import GeneTableVectors, TokenReader
from sct.models import registry
from sct.models.adapter_kinds import CONFIGS
from sct.tasks import masked_values
from sct.tasks.finetuning import FineTuning
from sct.weights import scgpt


def _convert(source: Path, target: Path, dtype: str, genes: GeneVocabulary | None, numbered: bool) -> None:
    scgpt.convert(source).save_pretrained(target, dtype=dtype)


FAMILY = Family(
    name="scgpt",
    title="A transformer reads the genes of a cell with their expression values, and predicts masked values",
    paper="scGPT: toward building a foundation model for single-cell multi-omics using generative AI",
    guide="docs/howto/pretrain_encoder.md",
    models={
        "scgpt": FamilyModel(
            registry.MODELS["scgpt"],
            tasks=(masked_values.SPEC,),
            config="configs/scgpt_pretrain.py",
            adapters=CONFIGS,
            embed=TokenReader,
            embed_genes=GeneTableVectors,
            finetune=FineTuning(gene_embedding=(r"^gene$",), frozen=(r"^batch_stats/",)),
        )
    },
    license=scgpt.NOTICE,
    converters={
        "scgpt": Converter(
            _convert,
            scgpt.save,
            scgpt.NOTICE,
            title="scGPT",
            weights="published scGPT models",
            files="DIR contains `args.json`, `vocab.json`, and `best_model.pt` (with the extra `torch` of sct) or "
            "`model.safetensors`. Genes that are not in the table of human genes keep their embeddings and names. The "
            "command lists the heads and options that DIR lacks.",
        )
    },
)
