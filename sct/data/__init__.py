"""Genes, counts, stores, tokens, bags and loaders: everything between a file of cells and a batch."""
