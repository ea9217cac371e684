"""The version, where code that must not import the rest can read it."""

__version__ = "0.1.0"
