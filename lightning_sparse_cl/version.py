"""The version of the package, of which pyproject.toml reads it."""

__version__ = "0.1.0"
