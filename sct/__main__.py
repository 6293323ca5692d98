"""Run the `sct` command as `python -m sct`."""

from sct.cli import main

if __name__ == "__main__":
    main()
