"""List the model families, and the models in folders.

    python -m launch.models

`--help` lists all flags; see also `sct.commands.models`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("models")
