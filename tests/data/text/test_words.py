"""Words of texts as numbers: the same as splitting and asking a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sct.data.text.gene_tokens import GeneTokens

NAMES = ["A", "AB", "CD8A", "HLA-DRA", "EIGHTCHR", "EIGHTCHRX", "ENSG00000123456.12", "RP11-34P13.7", "B"]
words = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(
        [name[:-1] for name in NAMES] + [name + "X" for name in NAMES] + [n.lower() for n in NAMES]
    ),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.text("AB\0\x01\x7f", max_size=20),
)
spaces = st.text(" \t\n\v\f\r\x1c\x1d\x1e\x1f", min_size=1, max_size=3)
texts = st.lists(
    st.lists(st.tuples(words, spaces), max_size=12).map(lambda pairs: "".join(a + b for a, b in pairs)),
    max_size=6,
)


@pytest.mark.parametrize("names", [NAMES, [*NAMES, "gène"], []], ids=["ASCII", "other", "none"])
@given(texts=texts)
def test_words_are_found_as_by_splitting(names, texts):
    sizes, found = GeneTokens(names).find(texts)
    split = [text.split() for text in texts]
    assert sizes.tolist() == [len(each) for each in split]
    known = {name: place for place, name in enumerate(names)}
    assert found.tolist() == [known.get(word, -1) for each in split for word in each]


def test_plain_texts_are_not_split(monkeypatch):
    def split(*arguments):
        raise AssertionError("the slow way")

    monkeypatch.setattr(GeneTokens, "look_up", split)
    sizes, found = GeneTokens(NAMES).find(
        ["CD8A  nothing\tRP11-34P13.7", "", "RP11-34P13.77 ENSG00000123456.12"]
    )
    assert (sizes.tolist(), found.tolist()) == ([3, 0, 2], [2, -1, 7, -1, 6])
    assert found.dtype == np.int64
