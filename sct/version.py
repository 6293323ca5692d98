"""Define the version, package name and repository of this project; all output files record the version."""

__version__ = "0.1.0"

# Name on the package index, where another project is already named `sct`. The module and the command are named sct.
DISTRIBUTION = "sct-jax"
# Public URL of the repository, https://HOST/NAME/PROJECT. If None, no output mentions a URL.
REPOSITORY: str | None = None
