"""The version: of the package, its files and its release."""

__version__ = "0.2.0.dev0"
