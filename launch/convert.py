"""Convert published weights to a model folder, and back.

    python -m launch.convert --from=FORMAT --input=DIR --output=MODEL_DIR
    python -m launch.convert --from=hf --input=DIR --output=MODEL_DIR
    python -m launch.convert --from=sct --to=hf --input=MODEL_DIR --output=DIR

`--help` lists all flags; see also `sct.commands.convert`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("convert")
