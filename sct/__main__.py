"""`python -m sct` is the `sct` command."""

from sct.cli import main

if __name__ == "__main__":
    main()
