"""The one place of the version: pyproject.toml, the compiled library and checkpoints read it here."""

__version__ = "0.2.0"
