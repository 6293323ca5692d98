"""Identify genes: gene vocabularies, matching of gene names, orthologues, and text descriptions of genes."""
