"""The other libraries, imported when a test asks for them, so that all tests can be collected without them."""

import pytest

from tests.support.peers import peer


@pytest.fixture(scope="session")
def peft():
    """huggingface's peft."""
    return peer("peft")


@pytest.fixture(scope="session")
def transformers():
    """huggingface's transformers."""
    return peer("transformers", "4.57")  # as adapters; later ones name a ViT's tensors otherwise


@pytest.fixture(scope="session")
def adapters():
    """adapter-hub's adapters."""
    return peer("adapters")
