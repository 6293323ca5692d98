"""Define the family ZerOmics: a cell encoder that uses gene summaries, and a language model that answers questions."""

from __future__ import annotations

import functools

from sct.families.cell2sentence import HUGGING_FACE
from sct.families.manifest import Family, FamilyModel
from sct.inference.asking import InstructionAnnotator, instruction_model_of
from sct.inference.binned_cells import BinReader
from sct.inference.gene_vectors import TextFeatureVectors
from sct.models import registry
from sct.models.adapter_kinds import CONFIGS
from sct.models.zeromics_cells import FEATURES
from sct.tasks import instructions, masked_bins
from sct.tasks.finetuning import FineTuning

_CELLS = "zeromics_cells"

FAMILY = Family(
    name="zeromics",
    title="A cell model reads expression bins and texts about genes. A LLaMA with LoRA adapters answers questions "
    "about cells",
    paper="ZerOmics: toward general models for single-cell analysis with instruction tuning",
    guide="docs/zeromics.md",
    models={
        "zeromics": FamilyModel(
            registry.MODELS["zeromics"],
            tasks=(instructions.SPEC,),
            config="configs/zeromics_llm.py",
            adapters=(),  # the task trains its own mixture of adapters
            embed=functools.partial(BinReader.of_part, part="cells", architecture=_CELLS),
            embed_genes=functools.partial(TextFeatureVectors, part="cells"),
            annotate=InstructionAnnotator,
            ask=instruction_model_of,
        ),
        _CELLS: FamilyModel(
            registry.MODELS[_CELLS],
            tasks=(masked_bins.SPEC,),
            config="configs/zeromics_sc.py",
            adapters=CONFIGS,
            embed=BinReader,
            embed_genes=TextFeatureVectors,
            finetune=FineTuning(gene_embedding=(r"^project$",), frozen=(f"^{FEATURES}$",)),
        ),
        # Computes gene features from texts.
        "bert": FamilyModel(registry.MODELS["bert"], adapters=CONFIGS),
    },
    converters={"hf": HUGGING_FACE},
)
