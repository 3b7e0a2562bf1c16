"""``vpeft push``: what arrives at a Hub on loopback."""

import shutil

import huggingface_hub.constants
import pytest
import timm
import yaml
from huggingface_hub import ModelCard

import vpeft
from tests.support.fake_hub import TOKEN, FakeHub
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.errors import CheckpointError, ConfigError, DownloadError
from vpeft.zoo.pushing import _numbers, push


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose token is known here."""
    with FakeHub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # What the variable of this name does where it is set before the import: uploads by Git LFS's protocol, not by Xet's.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield found


def test_a_run_arrives_with_its_configuration_and_card(runs, hub, capsys):
    main(["push", str(runs[0]), "--repo", "ann/digits"])
    where = capsys.readouterr().out.split()[-1]
    assert where == "hf://ann/digits/adapter.safetensors"
    repo = hub.repos["ann/digits"]
    assert not repo.private
    assert {path for _, path, token in hub.log if not token} <= {f"/upload/{oid}" for oid in hub.blobs} | {
        "/api/validate-yaml"
    }
    assert len(repo.messages) == 1, "one commit"
    files = repo.branches["main"][-1]
    assert set(files) == {"adapter.safetensors", "config.yaml", "README.md"}
    assert yaml.safe_load(files["config.yaml"])["seed"] == 3
    for data in files.values():
        assert str(runs[0].parents[2]).encode() not in data, "no path of this machine"


def test_it_loads_from_there_with_the_same_values(runs, hub):
    where = push(runs[0], "ann/digits")
    model = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True)
    vpeft.load(model, where)
    mine, its = checkpoint.read(where).tensors, checkpoint.read(runs[0] / "best.safetensors").tensors
    assert mine.keys() == its.keys()
    assert all((mine[name] == its[name]).all() for name in its)


def test_the_card_has_the_metrics_in_its_metadata(runs, hub):
    push(runs[0], "ann/digits", licence="MIT")
    card = ModelCard(hub.repos["ann/digits"].branches["main"][-1]["README.md"].decode())
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == ("vpeft", "mit", "image-classification")
    assert {"vpeft", "timm", "linear"} <= set(card.data.tags)
    results = {r.metric_name: r for r in card.data.eval_results}
    assert results["test_top1"].metric_value == pytest.approx(30 + 3 / 7)
    assert (results["test_top1"].metric_type, results["test_top1"].dataset_name) == ("accuracy", "digits")
    assert results["test_loss"].metric_value == 5.0
    assert 'vpeft.load(model, "hf://ann/digits/adapter.safetensors")' in card.text
    assert "| test_top1 | 30.4286 |" in card.text


@pytest.mark.parametrize(("name", "plain"), [("vit_micro.digits.lora", True), ("vit_micro.scenes.lora", False)])
def test_the_card_shows_code_only_where_the_timm_model_is_all_there_is(hub, name, plain):
    push(f"zoo:{name}", "ann/some")
    card = ModelCard(hub.repos["ann/some"].branches["main"][-1]["README.md"].decode())
    assert "vpeft predict --ckpt hf://ann/some/adapter.safetensors FILE…" in card.text
    assert ("timm.create_model" in card.text) == ("vpeft.load" in card.text) == plain


def test_numbers_that_are_none_are_not_in_the_card():
    metrics = {"test_top1": 50.0, "val_top1": float("nan"), "test_loss": float("inf"), "epoch": 1, "best": True}
    assert _numbers(metrics) == {"test_top1": 50.0, "epoch": 1}


def test_private_and_a_branch(runs, hub):
    where = push(runs[0], "ann/digits", private=True, revision="v1")
    assert where == "hf://ann/digits/adapter.safetensors@v1"
    repo = hub.repos["ann/digits"]
    assert repo.private
    assert repo.branches["main"][-1] == {}
    assert "adapter.safetensors" in repo.branches["v1"][-1]
    assert checkpoint.read(where).metadata["method"]["name"] == "linear"
    push(runs[1], "ann/digits", private=True, revision="v1")  # again, on what is there
    assert checkpoint.read(where).metadata["config"]["seed"] == 5


def test_what_is_public_does_not_get_what_should_be_private(runs, hub):
    push(runs[0], "ann/digits")
    with pytest.raises(ConfigError, match="already and public"):
        push(runs[1], "ann/digits", private=True)
    assert len(hub.repos["ann/digits"].messages) == 1


def test_a_checkpoint_and_a_name_of_the_zoo(runs, zoo, hub, monkeypatch):
    monkeypatch.setenv("VPEFT_ZOO", str(zoo))
    push(runs[0] / "best.safetensors", "ann/one")
    push("zoo:a.linear", "ann/two")
    one, two = (checkpoint.read(f"hf://{name}/adapter.safetensors") for name in ("ann/one", "ann/two"))
    assert one.metadata == two.metadata
    assert all((one.tensors[name] == two.tensors[name]).all() for name in one.tensors)


def test_a_checkpoint_of_ones_own_loop(hub, tmp_path):
    model = timm.create_model("vit_micro_patch4_28", num_classes=3)
    path = vpeft.attach(model, "bitfit").save(tmp_path / "mine.safetensors")
    push(path, "ann/mine")
    files = hub.repos["ann/mine"].branches["main"][-1]
    assert set(files) == {"adapter.safetensors", "README.md"}
    assert ModelCard(files["README.md"].decode()).data.eval_results is None


def test_nothing_is_sent_without_a_token(runs, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as error:
        main(["push", str(runs[0]), "--repo", "ann/digits"])
    text = capsys.readouterr().err
    assert error.value.code == 2
    assert "no token" in text
    assert text.count("\n") == 1
    assert not hub.log


@pytest.mark.parametrize("repo", ["digits", "a/b/c", "../b", "a/..", "a b/c", "", "a/b@v1", "https://x/y"])
def test_names_that_are_none(runs, hub, repo):
    with pytest.raises(ConfigError, match="user/name"):
        push(runs[0], repo)
    assert not hub.log


def test_what_cannot_be_pushed(runs, hub, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no folder of a run"):
        push(tmp_path, "ann/digits")
    with pytest.raises(CheckpointError, match="does not exist"):
        push(tmp_path / "a.safetensors", "ann/digits")
    with pytest.raises(ConfigError, match="--revision"):
        push(runs[0], "ann/digits", revision="a b")
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    (copy / "backbone.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"backbone.safetensors beside it alone"):
        push(copy, "ann/digits")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="network is off"):
        push(runs[0], "ann/digits")
    assert not hub.log


def test_a_wrong_token(runs, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DownloadError, match="ann/digits") as error:
        push(runs[0], "ann/digits")
    assert "hf_wrong" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not hub.repos
