"""Make the shipped gene table `sct/data/assets/genes_human.tsv.gz`.

    python tools/make_gene_table.py SOURCE.tsv.gz sct/data/assets/genes_human.tsv.gz

SOURCE is a tab-separated table of GENCODE 48 genes joined with the HGNC complete set. The columns of SOURCE are
ensembl_id, symbol, biotype, hgnc_id, hgnc_symbol_2020, name, locus_group, alias_symbols, prev_symbols and location.
Only protein-coding genes are written. Running the tool twice writes the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

COLUMNS = [
    "ensembl_id",
    "symbol",
    "name",
    "locus_group",
    "location",
    "alias_symbols",
    "prev_symbols",
    "hgnc_id",
]
CHROMOSOMES = {name: rank for rank, name in enumerate([*map(str, range(1, 23)), "X", "Y", "MT"])}
NOWHERE = (len(CHROMOSOMES), 0, 0)
BAND_DIGITS = (
    5  # most digits of a human band: one for the region, one for the band, up to three for the sub-band
)


def band_position(arm: str, digits: str) -> tuple[int, int]:
    """Return the sort key (arm, position) of a band's start.

    The key grows from the telomere of the short arm (p) to the telomere of the long arm (q).

    The digits of a band are a decimal fraction of the arm, counted from the centromere: band 36.3 contains 36.31 to
    36.33. No digits mean the whole arm. On the short arm, a band starts at its end that is far from the centromere. The
    position of this end is the negated upper end of the interval that the digits span.
    """
    digits = digits.replace(".", "")
    low = int(digits.ljust(BAND_DIGITS, "0") or 0)
    high = low + 10 ** (BAND_DIGITS - len(digits))
    return (0, -high) if arm == "p" else (1, low)


def position(location: str) -> tuple[int, int, int]:
    """Return the sort key of a cytogenetic location. For a range or a pair of locations, the first one counts."""
    if location == "mitochondria":
        return CHROMOSOMES["MT"], 0, 0
    match = re.fullmatch(r"(\d+|X|Y)([pq])(\d*(?:\.\d+)?)(?:-([pq])(\d+(?:\.\d+)?))?(?: and .+)?", location)
    if match is None:
        if location and not location.endswith("unplaced"):
            raise SystemExit(f"the location {location!r} is not a cytogenetic location: correct it in SOURCE")
        return NOWHERE
    chromosome, arm, digits, arm_2, digits_2 = match.groups()
    starts = [band_position(arm, digits)] + ([band_position(arm_2, digits_2)] if arm_2 else [])
    return CHROMOSOMES[chromosome], *min(starts)


def split(names: str) -> list[str]:
    """Split a string at each '|', and return the non-empty names."""
    return [name for name in names.split("|") if name]


def gene_table(source: pd.DataFrame) -> pd.DataFrame:
    """Return the table of the protein-coding genes in `source`, sorted by location and then by Ensembl id."""
    symbol_owners, alias_owners = defaultdict(set), defaultdict(set)
    for row in source.itertuples():
        symbol_owners[row.symbol].add(row.ensembl_id)
        for name in split(row.alias_symbols) + split(row.prev_symbols):
            alias_owners[name].add(row.ensembl_id)
    genes = source[source["biotype"] == "protein_coding"].copy()
    coding = set(genes["ensembl_id"])

    def kept(name: str, row: pd.Series) -> bool:
        # Drop names that also belong to a gene outside this table: they are ambiguous, but could not be recognized as
        # such from this table.
        others = (symbol_owners[name] | alias_owners[name]) - coding
        return name != row["symbol"] and not others

    # If two ids share a symbol, it belongs to the id for which HGNC approved it. The other id is in most cases the copy
    # of a pseudoautosomal gene on Y. It gets its id as symbol, like genes without a symbol.
    shared = genes["symbol"].duplicated(keep=False)
    if (genes[shared & (genes["hgnc_id"] != "")]["symbol"].value_counts() != 1).any():
        raise SystemExit(
            "a symbol belongs to several Ensembl ids, but HGNC does not approve it for exactly one of them: correct "
            "SOURCE"
        )
    copies = shared & (genes["hgnc_id"] == "")
    genes.loc[copies, "symbol"] = genes.loc[copies, "ensembl_id"]
    if genes["symbol"].duplicated().any():
        raise SystemExit("two genes still share a symbol: correct SOURCE")

    alias, previous = [], []
    for _, row in genes.iterrows():
        old = split(row["prev_symbols"])
        # The HGNC columns are older than the GENCODE ones, so their approved symbol may be a previous symbol now.
        if row["hgnc_symbol_2020"] not in ("", row["symbol"], *old):
            old.append(row["hgnc_symbol_2020"])
        old = [name for name in dict.fromkeys(old) if kept(name, row)]
        new = [n for n in dict.fromkeys(split(row["alias_symbols"])) if kept(n, row) and n not in old]
        previous.append("|".join(old))
        alias.append("|".join(new))
    genes["alias_symbols"], genes["prev_symbols"] = alias, previous
    keys = [(*position(loc), gene) for loc, gene in zip(genes["location"], genes["ensembl_id"], strict=True)]
    order = sorted(range(len(genes)), key=keys.__getitem__)
    return genes.iloc[order][COLUMNS]


def main() -> None:
    """Read the source table and write the gene table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    table = gene_table(pd.read_csv(args.source, sep="\t", dtype=str, keep_default_na=False))
    for column in COLUMNS:
        if table[column].str.contains("[\t\n\r]").any():
            raise SystemExit(f"column {column} has a tab or a line break: remove it in SOURCE")
    text = "\n".join(["\t".join(COLUMNS), *("\t".join(row) for row in table.itertuples(index=False)), ""])
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(text.encode())
    args.output.write_bytes(packed.getvalue())
    print(f"{len(table):,} genes, {len(packed.getvalue()):,} bytes -> {args.output}")


if __name__ == "__main__":
    main()
