"""The version, in a module of its own so that neither the build nor `--version` imports the engine."""

__version__ = "0.1.0"
