"""A mouse of our own: genes named after human ones, and tables of orthologs in the forms that users have."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd

from sct.data.genes.vocabulary import GeneVocabulary

HUMAN = GeneVocabulary.human()
SYMBOLS = ("CD3D", "MS4A1", "LYZ", "NKG7", "CD79A", "GNLY", "CST3", "FCER1A", "PPBP", "S100A8")
HOMOLOGY = "Human homology type"
# Of these the pair LYZ has two genes in mouse, GNLY none, and CD79A and CST3 are each other's in a tangle.
ONE_TO_ONE = ("CD3D", "MS4A1", "NKG7", "FCER1A", "PPBP", "S100A8")


def human_id(symbol: str) -> str:
    """Ensembl id of a human gene."""
    (at,) = HUMAN.owners_of_symbol[symbol]
    return HUMAN.ensembl_ids[at]


def mouse_id(number: int) -> str:
    """Ensembl id of a mouse gene."""
    return f"ENSMUSG{number:011d}"


def biomart() -> pd.DataFrame:
    """Rows as Ensembl gives them for mouse genes: one for each pair, and one for a gene without an ortholog."""
    rows = []
    for number, symbol in enumerate(SYMBOLS):
        kind = "ortholog_one2one" if symbol in ONE_TO_ONE else "ortholog_one2many"
        rows.append((mouse_id(number), symbol.capitalize(), human_id(symbol), symbol, kind))
    rows[5] = (mouse_id(5), "Gnly", "", "", "")
    rows.append((mouse_id(20), "Lyz2", human_id("LYZ"), "LYZ", "ortholog_one2many"))
    rows.append((mouse_id(4), "Cd79a", human_id("CST3"), "CST3", "ortholog_many2many"))
    rows.append((mouse_id(6), "Cst3", human_id("CD79A"), "CD79A", "ortholog_many2many"))
    rows.append(rows[0])  # a row for each transcript
    columns = [
        "Gene stable ID", "Gene name", "Human gene stable ID", "Human gene name", HOMOLOGY,
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def pairs_of(genes: GeneVocabulary = HUMAN) -> pd.DataFrame:
    """A mouse gene for each gene of a vocabulary."""
    return pd.DataFrame({"mouse": [mouse_id(i) for i in range(len(genes))], "human": genes.ensembl_ids})


def write(table: pd.DataFrame, path: Path) -> Path:
    """Write a table by the suffix of the path."""
    text = table.to_csv(index=False, sep="," if ".csv" in path.name else "\t")
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
