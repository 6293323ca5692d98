"""A bag that outgrows one device fits on several: a device needs what its own cells need."""

from __future__ import annotations

import pytest

from .conftest import answer

SMALL = {
    "num_genes": 1024, "num_downsamples": 4, "token_embed_dim": 32, "embed_dim": 64, "num_layers": 1,
    "num_heads": 2, "ffn_dim": 64,
}  # fmt: skip


def needs(bag: dict[str, float]) -> float:
    return bag["temporaries"] + bag["arguments"]


@pytest.mark.slow
def test_eight_times_the_cells_on_eight_devices_need_no_more_of_each():
    bags = [{"cells": 16}, {"cells": 128, "sequence": 8}]
    one, eight = answer("bag_memory", {"model": SMALL, "max_masked_fraction": 0.25, "bags": bags})
    assert needs(eight) < 1.3 * needs(one)
    # The scores of the whole bag, or the head at all of its positions, would be larger than anything else.
    assert eight["largest"] < 1.3 * one["largest"]


@pytest.mark.slowest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_million_tokens_at_full_size(dtype):
    bags = [{"cells": 50}, {"cells": 400, "sequence": 8}]
    one, eight = answer("bag_memory", {"model": {"dtype": dtype}, "max_masked_fraction": 0.05, "bags": bags})
    assert needs(eight) < 1.3 * needs(one)
    scores = 4 * 16 * (400 * 78) ** 2 / 2**30
    assert needs(one) < scores / 2
