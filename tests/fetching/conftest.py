"""The bytes of an adapter."""

import pytest

import vpeft
from tests.support.caches import cache  # noqa: F401 - a fixture
from tests.support.models import make, train_steps


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> bytes:
    """The bytes of a trained adapter's file."""
    model = make("vit")
    handle = vpeft.attach(model, "lora", rank=16)
    train_steps(model, handle)
    return handle.save(tmp_path_factory.mktemp("adapter") / "a.safetensors").read_bytes()
