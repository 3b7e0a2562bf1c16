"""``vpeft.zoo`` and ``zoo:NAME``: from the package, a folder, a web server and the Hub."""

import hashlib
import json
import sys

import pytest
import timm
import torch
from omegaconf import OmegaConf

import vpeft
from tests.support.fake_hub import FakeHub
from tests.support.servers import Served, Server
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.engine.config import load_config
from vpeft.engine.train import check_files
from vpeft.errors import CheckpointError, ConfigError, DownloadError
from vpeft.fetching import local_file
from vpeft.files import shipped
from vpeft.tasks.registry import get_task
from vpeft.zoo import adding

VIT = "vit_micro_patch4_28.vpeft_fashion"
LINEAR = shipped("configs") / "digits" / "linear.yaml"


def put(zoo, name: str, config) -> None:
    """An adapter that is not trained, of any task, into a zoo."""
    task = get_task(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = task.assemble(task.build_backbone(10), 10)
        handle = vpeft.attach(built.backbone, config.method.name, heads=built.heads)
    values = OmegaConf.to_container(config)
    names = [str(i) for i in range(10)]
    path = handle.save(zoo / "adapters" / f"{name}.safetensors", class_names=names, config=values)
    data = path.read_bytes()
    metric = adding.metric("test_top1", [50.0])
    entry = {
        "name": name, "kind": "adapter", "task": config.task, "method": config.method.name, "backbone": VIT, "dataset": "x",
        "file": f"adapters/{name}.safetensors", "place": "index", "size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "metric": "test_top1", "metrics": [metric], "seeds": [0], "parameters": 1, "config": values, "licence": "MIT",
        "command": "vpeft train", "notes": ["of nothing"],
    }  # fmt: skip
    adding.put(zoo, entry)


@pytest.fixture
def model():
    return timm.create_model(VIT, pretrained=True)


# ---- in code ----


def test_it_is_an_attribute_of_the_package():
    assert vpeft.__getattr__("zoo") is sys.modules["vpeft.zoo"]
    assert "zoo" in vpeft.__all__
    with pytest.raises(AttributeError, match="has no attribute 'zo'"):
        _ = vpeft.zo


def test_list(zoo):
    (entry,) = vpeft.zoo.list(index=zoo)
    assert (entry.name, entry.method, entry.backbone, entry.metrics[0].values) == (
        "a.linear",
        "linear",
        VIT,
        entry.metrics[0].values,
    )
    assert vpeft.zoo.list(index=zoo, method="lora") == []
    assert vpeft.zoo.list(index=zoo, task="classification", kind="adapter") == [entry]
    assert {e.name for e in vpeft.zoo.list(kind="backbone")} >= {"vit_micro_patch4_28", "swin_micro_patch2_window7_28"}


def test_load_and_create_give_the_same_model(zoo, model):
    handle = vpeft.zoo.load(model, "a.linear", index=zoo, name="mine")
    made, its = vpeft.zoo.create("zoo:a.linear", index=zoo)
    assert (handle.name, its.name, made.training) == ("mine", "linear", False)
    images = torch.rand(2, 3, 28, 28)
    assert torch.equal(model.eval()(images), made(images))


@pytest.mark.slow  # for what mmsegmentation imports
def test_create_for_segmentation(tmp_path):
    zoo = tmp_path / "zoo"
    put(zoo, "seg", load_config(shipped("configs") / "seg/lora.yaml"))
    seg, handle = vpeft.zoo.create("seg", index=zoo)
    assert seg.semantic(torch.rand(1, 3, 56, 56)).shape[:2] == (1, 10)
    assert handle.name == "lora"


def test_create_for_video(tmp_path):
    zoo = tmp_path / "zoo"
    put(zoo, "clips", load_config(shipped("configs") / "video/motion/lora.yaml"))
    clips, handle = vpeft.zoo.create("clips", index=zoo)
    assert clips(torch.rand(1, 3, 4, 20, 20)).shape == (1, 10)
    assert handle.enabled


def test_create_a_backbone():
    made, handle = vpeft.zoo.create("vit_micro_patch4_28")
    assert handle is None
    assert made.num_classes == 10
    assert not made.training


def test_what_cannot_be_loaded(zoo, model):
    before = sorted(model.state_dict())
    with pytest.raises(DownloadError, match=r"did you mean 'a.linear'"):
        vpeft.zoo.load(model, "a.linaer", index=zoo)
    with pytest.raises(DownloadError, match="is a backbone, no adapter"):
        vpeft.zoo.load(model, "vit_micro_patch4_28")
    with pytest.raises(DownloadError, match="is a backbone, no adapter"):
        vpeft.load(model, "zoo:vit_micro_patch4_28")
    with pytest.raises(DownloadError, match="expected the name"):
        vpeft.zoo.load(model, None, index=zoo)
    with pytest.raises(DownloadError, match="does not exist"):
        vpeft.zoo.list(index=zoo / "nothing")
    swin = timm.create_model("swin_micro_patch2_window7_28.vpeft_fashion")
    with pytest.raises(CheckpointError, match="made for another backbone"):
        vpeft.zoo.load(swin, "a.linear", index=zoo)
    assert sorted(model.state_dict()) == before


@pytest.mark.parametrize("damage", ["gone", "cut", "bit", "link"])
def test_a_damaged_file_is_never_loaded(zoo, model, damage, capsys, tmp_path):
    path = zoo / "adapters" / "a.linear.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "link":
        (tmp_path / "other.safetensors").write_bytes(data)
        path.symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(DownloadError, match=r"zoo:a.linear: .*a.linear.safetensors"):
        vpeft.zoo.load(model, "a.linear", index=zoo)
    with pytest.raises(SystemExit):
        main(["zoo", "verify", "--index", str(zoo)])
    captured = capsys.readouterr()
    assert "1 of 1 entries" in captured.err
    assert "zoo:a.linear" in captured.out


def test_verify_compares_what_the_file_says(zoo):
    index = json.loads((zoo / "index.json").read_text())
    index["entries"][0]["config"]["optim"]["lr"] = 7.0
    (zoo / "index.json").write_text(json.dumps(index))
    assert "another config" in vpeft.zoo.verify(index=zoo)["a.linear"]


# ---- zoo:NAME wherever a checkpoint is taken ----


def test_a_name_stands_for_a_checkpoint(zoo, monkeypatch, model, capsys, tmp_path):
    monkeypatch.setenv("VPEFT_ZOO", str(zoo))
    assert local_file("zoo:a.linear") == zoo / "adapters/a.linear.safetensors"
    assert checkpoint.read("zoo:a.linear").metadata["method"]["name"] == "linear"
    assert vpeft.load(model, "zoo:a.linear").name == "linear"
    with pytest.raises(DownloadError, match="zoo:nothing: the zoo"):
        vpeft.fuse(model, ["zoo:nothing"])
    with pytest.raises(CheckpointError, match="must lie in the composition's folder"):
        vpeft.save_composition(model, tmp_path / "c.json", files={"linear": "zoo:a.linear"})
    with pytest.raises(CheckpointError, match=r"zoo:a\.linear.*: a composition is on this machine"):
        vpeft.load_composition(model, "zoo:a.linear")


def test_a_run_starts_from_a_name(zoo, monkeypatch):
    monkeypatch.setenv("VPEFT_ZOO", str(zoo))
    check_files(load_config(LINEAR, ["init=zoo:a.linear"]))
    with pytest.raises(ConfigError, match=r"init: zoo:b: the zoo .* has no such entry"):
        check_files(load_config(LINEAR, ["init=zoo:b"]))
    with pytest.raises(ConfigError, match=r"init: .*ftp"):
        check_files(load_config(LINEAR, ["init='ftp://a/b.safetensors'"]))


def test_a_file_of_such_a_name_is_meant_by_a_path(zoo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = (zoo / "adapters/a.linear.safetensors").read_bytes()
    (tmp_path / "zoo:mine").write_bytes(data)
    assert checkpoint.read("./zoo:mine").metadata["method"]["name"] == "linear"


# ---- the command ----


def test_list_show_and_download(zoo, capsys, tmp_path, monkeypatch):
    main(["zoo", "list", "--index", str(zoo)])
    assert capsys.readouterr().out.startswith("a.linear  classification  linear          test_top1 ")
    main(["zoo", "show", "zoo:a.linear", "--index", str(zoo)])
    assert json.loads(capsys.readouterr().out)["seeds"] == [3, 5]
    monkeypatch.setenv("VPEFT_ZOO", str(zoo))
    main(["zoo", "download", "a.linear", "--out", str(tmp_path / "out")])
    copy = tmp_path / "out" / "a.linear.safetensors"
    assert capsys.readouterr().out.split() == [str(copy)]
    assert copy.read_bytes() == (zoo / "adapters/a.linear.safetensors").read_bytes()
    with pytest.raises(SystemExit) as error:
        main(["zoo", "download", "a.linear", "b", "--out", str(tmp_path / "other")])
    assert error.value.code == 2
    assert not (tmp_path / "other").exists()


# ---- elsewhere ----


@pytest.fixture
def server(zoo):
    """The zoo on a web server, below ``/z/``."""
    paths = {f"/z/{p.relative_to(zoo).as_posix()}": Served(p.read_bytes()) for p in zoo.rglob("*") if p.is_file()}
    with Server(**paths) as found:
        yield found


def test_a_zoo_on_a_web_server(server, model, monkeypatch):
    for address in ("/z/", "/z/index.json", "/z"):
        monkeypatch.setenv("VPEFT_ZOO", server.url + address)
        assert [entry.name for entry in vpeft.zoo.list()] == ["a.linear"]
    vpeft.load(model, "zoo:a.linear")
    monkeypatch.setenv("VPEFT_OFFLINE", "1")
    asked = len(server.log)
    vpeft.zoo.create("a.linear")
    assert vpeft.zoo.verify() == {"a.linear": None}
    assert len(server.log) == asked


@pytest.mark.parametrize("damage", [{"cuts": [2000] * 9, "ranges": False}, {"body": b"x" * 100}, {"statuses": [404]}])
def test_a_web_server_that_has_another_file(server, model, damage):
    served = server.paths["/z/adapters/a.linear.safetensors"]
    for key, value in damage.items():
        setattr(served, key, value)
    with pytest.raises(DownloadError, match=r"zoo:a.linear: http://"):
        vpeft.zoo.load(model, "a.linear", index=f"{server.url}/z")


def test_a_file_of_the_right_size_with_other_bytes(server, model):
    served = server.paths["/z/adapters/a.linear.safetensors"]
    served.body = served.body[:-1] + bytes([served.body[-1] ^ 1])
    with pytest.raises(DownloadError, match="wrong checksum"):
        vpeft.zoo.load(model, "a.linear", index=f"{server.url}/z")


def test_an_index_that_is_no_index_does_not_take_the_place_of_one(server, caplog):
    address = f"{server.url}/z"
    assert vpeft.zoo.list(index=address)
    server.paths["/z/index.json"].body = b"<html>"
    with pytest.raises(DownloadError, match="no index of a model zoo"):
        vpeft.zoo.list(index=address)
    server.stop()
    assert vpeft.zoo.list(index=address), "the one from before is still there"


def test_a_zoo_on_the_hub(zoo, model, monkeypatch):
    files = {"index.json": (zoo / "index.json").read_bytes()}
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        index = json.loads(files["index.json"])
        index["entries"][0]["file"] = "a.linear.safetensors"
        hub.put(
            "ann/zoo",
            **{
                "index.json": json.dumps(index).encode(),
                "a.linear.safetensors": (zoo / "adapters/a.linear.safetensors").read_bytes(),
            },
        )
        first = vpeft.zoo.load(model, "a.linear", index="hf://ann/zoo")
        hub.put("ann/zoo", **{"a.linear.safetensors": b"other"})
        with pytest.raises(DownloadError, match=r"zoo:a.linear: .*has 5 bytes"):
            vpeft.zoo.load(model, "a.linear", index="hf://ann/zoo", name="two")
        with pytest.raises(DownloadError, match="whole repository"):
            vpeft.zoo.list(index="hf://ann/zoo/index.json")
    assert first.name == "linear"


def test_a_filter_that_nothing_passes_says_what_there_is(zoo, capsys):
    for option, value in (("--task", "clasification"), ("--method", "linaer")):
        with pytest.raises(SystemExit) as end:
            main(["zoo", "list", option, value, "--index", str(zoo)])
        assert end.value.code == 2
        assert f"{option}: no entry has '{value}'; did you mean '" in capsys.readouterr().err
