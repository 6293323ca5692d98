"""Run a model over the cells of an AnnData, batch by batch. `sct.families` lists the reader of each model."""
