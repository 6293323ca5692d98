"""Running a model over the cells of an AnnData, batch by batch; `sct.families` says which model reads cells how."""
