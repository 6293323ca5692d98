"""Result tables, and how they are printed and saved."""
