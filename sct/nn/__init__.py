"""Building blocks of all model families, each with its logical axis names (see `sct.nn.axes`)."""
