"""Convert input files to a store: input discovery, readers, worker processes, sorting, writing and splits."""
