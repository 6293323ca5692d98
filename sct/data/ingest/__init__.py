"""From foreign files to a store: sources, readers, workers, order, writer and splits."""
