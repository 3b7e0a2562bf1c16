"""``hf://`` through huggingface_hub, from a Hub on loopback."""

import os
import subprocess
import sys

import pytest

import vpeft
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.models import make
from vpeft.errors import CheckpointError, DownloadError
from vpeft.fetching import hub, local_file


@pytest.fixture
def there(monkeypatch):
    """A Hub, which ``HF_ENDPOINT`` names."""
    with FakeHub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def test_a_file_of_the_hub_stands_where_a_checkpoint_is_taken(there, adapter, tmp_path):
    there.put("ann/digits", a__safetensors=adapter)
    model = make("vit")
    assert vpeft.load(model, "hf://ann/digits/a.safetensors").name == "lora"
    path = local_file("hf://ann/digits/a.safetensors")
    assert path.read_bytes() == adapter
    assert path.is_relative_to(tmp_path / "hf" / "hub")  # huggingface_hub's own cache
    assert [method for method, _, _ in there.log].count("GET") == 1


def test_revisions(there, adapter):
    first = there.put("ann/digits", a__safetensors=adapter)
    other = vpeft.attach(make("vit"), "bitfit")
    data = other.save(local_file("hf://ann/digits/a.safetensors").parent / "b.safetensors").read_bytes()
    there.put("ann/digits", a__safetensors=data)
    there.put("ann/digits", "refs/pr/1", a__safetensors=adapter)
    assert local_file("hf://ann/digits/a.safetensors").read_bytes() == data
    assert local_file("hf://ann/digits/a.safetensors@main").read_bytes() == data
    assert local_file(f"hf://ann/digits/a.safetensors@{first}").read_bytes() == adapter
    assert local_file("hf://ann/digits/a.safetensors@refs/pr/1").read_bytes() == adapter


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://ann/nothing/a.safetensors", "no 'ann/nothing'.*HF_TOKEN"),
        ("hf://ann/digits/b.safetensors", "no file 'b.safetensors' at its main branch"),
        ("hf://ann/digits/a.safetensors@v9", "no revision 'v9'"),
        ("hf://ann/secret/a.safetensors", "no 'ann/secret'.*no token"),
    ],
)
def test_what_is_not_there(there, adapter, source, message):
    there.put("ann/digits", a__safetensors=adapter)
    there.put("ann/secret", a__safetensors=adapter)
    there.repos["ann/secret"].private = True
    with pytest.raises(DownloadError, match=message) as error:
        local_file(source)
    assert source in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_opens_a_private_repository(there, adapter, monkeypatch):
    there.put("ann/secret", a__safetensors=adapter)
    there.repos["ann/secret"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert local_file("hf://ann/secret/a.safetensors").read_bytes() == adapter
    assert all(token for _, _, token in there.log)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "VPEFT_OFFLINE"])
def test_offline_only_what_is_there(there, adapter, monkeypatch, variable):
    there.put("ann/digits", a__safetensors=adapter)
    local_file("hf://ann/digits/a.safetensors")
    monkeypatch.setenv(variable, "1")
    asked = len(there.log)
    assert local_file("hf://ann/digits/a.safetensors").read_bytes() == adapter
    with pytest.raises(DownloadError, match="network is off"):
        local_file("hf://ann/digits/b.safetensors")
    assert len(there.log) == asked


@pytest.mark.parametrize(
    "source",
    [
        "hf://ann", "hf://ann/digits", "hf://ann/digits/../../a.safetensors", "hf://ann/digits//a.safetensors",
        "hf://ann/digits/a.bin", "hf://ann/digits/a.safetensors@", "hf://../digits/a.safetensors", "hf://ann/digits/a b.safetensors",
        "hf:///ann/digits/a.safetensors", "hf://ann/digits/pytorch_model.pt@main",
    ],
)  # fmt: skip
def test_what_is_no_file_of_the_hub_is_refused_without_the_network(there, source):
    with pytest.raises(DownloadError):
        local_file(source)
    assert not there.log


def test_what_is_no_adapter(there):
    there.put("ann/digits", a__safetensors=b"<html>")
    with pytest.raises(CheckpointError, match="no safetensors") as error:
        vpeft.load(make("vit"), "hf://ann/digits/a.safetensors")
    assert "a.safetensors" in str(error.value)


def test_places_are_written_as_they_are_read():
    for text in ("hf://a/b", "hf://a/b@v1", "hf://a/b/c/d.safetensors", "hf://a/b/c.safetensors@refs/pr/1"):
        assert str(hub.Place.of(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_the_variables_act_in_a_process_of_its_own(adapter, tmp_path, offline):
    code = "import vpeft.fetching as f; print(f.local_file('hf://ann/digits/a.safetensors').stat().st_size)"
    with FakeHub() as there:
        there.put("ann/digits", a__safetensors=adapter)
        environment = {**os.environ, "HF_ENDPOINT": there.url, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        for again in range(1 + offline):
            more = {"HF_HUB_OFFLINE": "1"} if again else {}
            done = subprocess.run([sys.executable, "-c", code], env=environment | more, capture_output=True, text=True)
            assert done.stdout.strip() == str(len(adapter)), done.stderr
            if not again:
                asked = len(there.log)
        assert len(there.log) == asked
