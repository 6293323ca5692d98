"""Make result tables, print them and save them."""
