"""Define the family sCT: a transformer between two convolution towers, which reads bags of 50 cells x 20,000 genes."""

from __future__ import annotations

from pathlib import Path

from sct.data.genes.vocabulary import GeneVocabulary
from sct.families.manifest import Converter, Family, FamilyModel
from sct.inference.bags import BagReader
from sct.inference.gene_vectors import ContextualVectors
from sct.models import registry
from sct.models.adapter_kinds import CONFIGS
from sct.tasks import masked_expression
from sct.tasks.finetuning import FineTuning
from sct.weights import haiku_sct


def _convert(source: Path, target: Path, dtype: str, genes: GeneVocabulary | None, numbered: bool) -> None:
    haiku_sct.convert(source, genes, numbered).save_pretrained(target, dtype=dtype)


FAMILY = Family(
    name="sct",
    title="sCT reads bags (groups of 50 cells with all genes) and predicts the expression levels of masked genes",
    paper="A long range foundation model for zero-shot predictions in single-cell and spatial transcriptomics data",
    guide="docs/tools.md",
    license=haiku_sct.NOTICE,
    models={
        "sct": FamilyModel(
            registry.MODELS["sct"],
            tasks=(masked_expression.SPEC,),
            config="configs/sct_sc.py",
            adapters=CONFIGS,
            embed=BagReader,
            embed_genes=ContextualVectors,
            impute=BagReader,
            finetune=FineTuning(),  # genes are positions of the input and have no embedding
        )
    },
    converters={
        "haiku-sct": Converter(
            _convert,
            notice=haiku_sct.NOTICE,
            takes_genes=True,
            weights="the published sCellTransformer (Haiku parameters)",
            files="DIR, or the folder `jax_params` inside it, contains `config.json` and `params.joblib`. The files "
            "`ensembl_id_vocab.json` and `protein_gene_map.json` define the order of the genes.",
        )
    },
)
