"""The version, written into every file that the project makes, and where the project is found."""

__version__ = "0.1.0"

# Name on the package index, where `sct` is another project. The package and the command are called sct.
DISTRIBUTION = "sct-jax"
# Public address of the repository, https://HOST/NAME/PROJECT; None leaves it out wherever it would be printed.
REPOSITORY: str | None = None
