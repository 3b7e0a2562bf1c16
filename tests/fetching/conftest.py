"""A cache of its own for each test, and the bytes of an adapter."""

import pytest

import vpeft
from tests.support.models import make, train_steps
from vpeft.fetching import http


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder; nothing else of the environment acts."""
    for name in ("VPEFT_ZOO", "VPEFT_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "PAUSE", 0.005)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> bytes:
    """The bytes of a trained adapter's file."""
    model = make("vit")
    handle = vpeft.attach(model, "lora", rank=16)
    train_steps(model, handle)
    return handle.save(tmp_path_factory.mktemp("adapter") / "a.safetensors").read_bytes()
