"""Tables of results, and the folder and page that hold them."""
