"""Identify genes: gene vocabularies, matching of gene names, orthologs, and text descriptions of genes."""
