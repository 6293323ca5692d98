"""Model folders, and converters of foreign formats."""
