"""Features of genes, by a text model or from a table."""
