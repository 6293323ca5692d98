"""Model cards: a block that model hubs read, the license, and what a stranger needs to use a model."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import yaml

from sct.models import registry
from sct.models.sct_config import SCTConfig
from sct.nn.paths import unflatten
from sct.weights import haiku_sct, model_folder, pretrained
from sct.weights.hf import folder as hf


def model_of(license: str = "unknown", family: str = "sct", config: Any = None) -> pretrained.Pretrained:
    config = config or SCTConfig(
        num_genes=64, token_embed_dim=32, embed_dim=32, num_downsamples=2, num_layers=1
    )
    return pretrained.Pretrained(family, config, unflatten({"params/w": np.zeros(3)}), license=license)


def front_matter(card: str) -> dict[str, Any]:
    block = re.match(r"\A---\n(.*?)\n---\n", card, re.DOTALL)
    assert block, card[:200]
    return yaml.safe_load(block[1])


def test_every_architecture_has_a_card_with_the_same_sections():
    missing = []
    for name, architecture in registry.MODELS.items():
        sized = (
            {"vocab_size": 10}
            if "vocab_size" in {f.name for f in dataclasses.fields(architecture.config)}
            else {}
        )
        if not sized and name != "zeromics":
            sized = {"num_genes": 512}
        # Numbers of special tokens, which must be below the size of the vocabulary.
        own = {f.name for f in dataclasses.fields(architecture.config)}
        sized |= {key: row for key, row in {"pad_id": 8, "cls_id": 9}.items() if key in own}
        config = architecture.config if name == "zeromics" else registry.model_config(name, sized, 512)
        card = pretrained.default_card(model_of(family=name, config=config), "## Training\n\nTrained.")
        headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
        if headings != ["Intended use", "Training", "Limitations", "License"]:
            missing.append((name, headings))
        block = front_matter(card)
        assert block["library_name"] == "sct"
        assert {"single-cell", name} <= set(block["tags"])
        assert "import sct\nmodel = sct.load" in card
        assert "Apache-2.0" in card
    assert missing == []


@pytest.mark.parametrize(
    ("license", "block"),
    [
        ("unknown", {"license": "unknown"}),
        ("mit", {"license": "mit"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("llama2 and mit", {"license": "other", "license_name": "llama2 and mit"}),
        ('a "free": one', {"license": "other", "license_name": 'a "free": one'}),
    ],
)
def test_hubs_can_read_the_license(license, block):
    card = pretrained.default_card(model_of(license))
    found = front_matter(card)
    assert {name: found.get(name) for name in block} == block
    assert ("license_name" in found) == ("license_name" in block)
    assert (license in card) or license == "unknown"
    assert ("Before you share them" in card) == (license == "unknown")


def test_the_license_of_published_weights_is_in_the_card():
    card = pretrained.default_card(model_of(haiku_sct.LICENSE), haiku_sct.NOTICE)
    assert front_matter(card)["license"] == "cc-by-nc-sa-4.0"
    assert "non-commercial" in card


def test_a_license_with_a_name_comes_back_from_a_folder(tmp_path, monkeypatch):
    """The card is the only place where a Hugging Face folder has its license."""
    for license in ("llama2 and mit", "mit", "unknown"):
        (tmp_path / model_folder.CARD).write_text(pretrained.default_card(model_of(license)))

        @dataclasses.dataclass
        class Opened:
            family = "sct"
            config = model_of().config

        assert hf._handle(tmp_path, Opened(), {"params/w": np.zeros(3)}).license == license
