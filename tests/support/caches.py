"""A cache of downloads for each test alone; a ``conftest.py`` imports the fixture."""

import pytest

from vpeft.fetching import http


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder; nothing else of the environment acts."""
    for name in ("VPEFT_ZOO", "VPEFT_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "PAUSE", 0.005)
    return tmp_path / "cache"
