"""Gene vocabularies, gene name resolution, orthologues, and text descriptions of genes."""
