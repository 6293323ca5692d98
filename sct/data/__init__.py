"""Prepare data for models: gene vocabularies, ingest, stores, tokens, bags of cells, and batch loading."""
