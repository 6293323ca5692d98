"""Generated cells and texts: measures and reports."""
