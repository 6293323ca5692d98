"""Model folders, and converters from and to foreign formats."""
