"""The gene vocabulary, how the genes of an input are found in it, orthologues, and texts about genes."""
