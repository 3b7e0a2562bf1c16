"""The runs that take seconds, in tables too."""

from tests.engine.conftest import tiny_file as tiny_file
