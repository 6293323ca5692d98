"""Define the family scGPT: a transformer that reads the genes of a cell as tokens with expression values."""

from __future__ import annotations

from sct.families.manifest import Family, FamilyModel
from sct.models import registry
from sct.models.adapter_kinds import CONFIGS

FAMILY = Family(
    name="scgpt",
    title="A transformer reads the genes of a cell with their expression values, and predicts masked values",
    paper="scGPT: toward building a foundation model for single-cell multi-omics using generative AI",
    models={"scgpt": FamilyModel(registry.MODELS["scgpt"], adapters=CONFIGS)},
)
