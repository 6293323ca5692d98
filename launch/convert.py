"""Turn foreign weights into a model folder.

    python -m launch.convert --from=haiku-sct --input=DIR --output=MODEL_DIR

`--help` explains the flags; see `sct.commands.convert`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("convert")
