"""Our models beside those of other libraries, with the same weights."""
