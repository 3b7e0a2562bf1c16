"""``vpeft export``: timm folders without vpeft, torch.export and ONNX of every task, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import vpeft
from tests.support.fashion import fashion_root
from tests.support.models import make, randomise, scatter
from tests.support.places import ROOT
from vpeft import checkpoint
from vpeft.cli import main
from vpeft.docs.compatibility import ARCHITECTURES
from vpeft.engine.config import load_config
from vpeft.engine.predict import config_of
from vpeft.engine.train import train
from vpeft.errors import UnsupportedModelError
from vpeft.export import export
from vpeft.export.programs import run_onnx
from vpeft.export.source import kept_fused, of_checkpoint
from vpeft.numerics import seeded
from vpeft.tasks.registry import get_task
from vpeft.tasks.restore import restored

NAMES = ["ankle boot", "bag, small", 'coat "long"']
EMBEDDED = {"vit": "vit_micro_patch4_28.vpeft_fashion", "swin": "swin_micro_patch2_window7_28.vpeft_fashion"}


def saved(folder: Path, kind: str, method: str, **options) -> Path:
    """A checkpoint of an embedded backbone, all values of the method moved."""
    model = timm.create_model(EMBEDDED[kind], pretrained=True, num_classes=3)
    handle = vpeft.attach(model, method, **options)
    randomise(handle, 0.1)
    return handle.save(folder / f"{kind}_{method}.safetensors", class_names=NAMES)


def run(*arguments) -> int:
    """The exit status of the command."""
    try:
        main(["export", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def fresh(code: str, *arguments, path: str = "") -> str:
    """What a new process prints in which vpeft cannot be imported."""
    hide = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vpeft":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
try:
    import vpeft
    raise SystemExit("vpeft is there")
except ModuleNotFoundError:
    pass
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    done = subprocess.run(
        [sys.executable, "-c", hide + code, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def merged(ckpt: Path, like: torch.nn.Module) -> torch.nn.Module:
    """The checkpoint's model with its method in the weights, built anew, with the kernels of attention of another model."""
    file = checkpoint.read_header(ckpt)
    with kept_fused():
        model = restored(get_task(config_of(file)), file).backbone.cpu()
    for name, part in like.named_modules():  # a choice that timm makes when a model is built
        if hasattr(part, "fused_attn"):
            model.get_submodule(name).fused_attn = part.fused_attn
    return vpeft.get_handle(model).merge().detach(keep_merged=True)


# ---- timm ----


@pytest.mark.parametrize("kind", list(EMBEDDED))
def test_a_timm_folder_is_a_timm_model(tmp_path, kind, capsys):
    """Plain timm builds it: none of the names that vpeft registers is in it."""
    ckpt, out = saved(tmp_path, kind, "lora", rank=2), tmp_path / "out"
    before = ckpt.read_bytes()
    assert run("--ckpt", ckpt, "--format", "timm", "--out", out) == 0
    shown = capsys.readouterr()
    assert re.search(r"timm, merged; largest difference .* at a batch of 1, .* 2, .* 5 .*bit-identical", shown.out)
    assert shown.err.splitlines()[0] == "export: rebuilding the model"
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((out / "config.json").read_text())
    assert "micro" not in config["architecture"]
    assert config["label_names"] == NAMES
    assert config["pretrained_cfg"]["mean"] == [0.286] * 3
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    own = merged(ckpt, model)
    assert model.pretrained_cfg["label_names"] == NAMES
    assert (model.num_classes, tuple(model.pretrained_cfg["input_size"])) == (3, (3, 28, 28))
    x = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(x), own(x))
    assert ckpt.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(EMBEDDED))
def test_timm_loads_the_folder_where_vpeft_is_not(tmp_path, kind):
    ckpt, out = saved(tmp_path, kind, "lora", rank=2), tmp_path / "out"
    export(ckpt, out, form="timm")
    x, own = torch.randn(4, 3, 28, 28), merged(ckpt, timm.create_model(EMBEDDED[kind]))
    with torch.no_grad():
        save_file({"x": x, "logits": own(x)}, tmp_path / "expected.safetensors")
    code = """
import timm, torch
from safetensors.torch import load_file
model, wanted = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval(), load_file(sys.argv[2])
with torch.no_grad():
    print(torch.equal(model(wanted["x"]), wanted["logits"]), model.pretrained_cfg["label_names"][0], "vpeft" in sys.modules)
"""
    assert fresh(code, out, tmp_path / "expected.safetensors") == f"True {NAMES[0]} False"


TINY = """
model:
  name: vit_tiny_patch16_224
  pretrained: false
  img_size: 16
  kwargs: {patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2%s}
"""


def tiny(folder: Path, method: str = "lora", more: str = "") -> Path:
    """A checkpoint of a random backbone, which its seed draws again, with its configuration."""
    (folder / "run.yaml").write_text(TINY % more)
    config = load_config(folder / "run.yaml", [])
    with seeded(config.seed):
        model = get_task(config).build_backbone(10)
    handle = vpeft.attach(model, method)
    randomise(handle, 0.1)
    names = [f"class {i}" for i in range(10)]
    return handle.save(folder / f"{method}.safetensors", class_names=names, config=OmegaConf.to_container(config))


def trained(folder: Path, text: str, *overrides: str) -> Path:
    """The best checkpoint of a run."""
    (folder / "run.yaml").write_text(text)
    config = load_config(folder / "run.yaml", [f"output={folder / 'runs'}", *overrides])
    train(config)
    return Path(config.output) / config.name / "best.safetensors"


@pytest.mark.parametrize(
    "more",
    [", global_pool: avg, qkv_bias: false", pytest.param(", dynamic_img_size: true, class_token: false, global_pool: avg",
     marks=pytest.mark.slow), pytest.param(", init_values: 0.1, reg_tokens: 2, pre_norm: true", marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_the_model_was_built_with_survives(tmp_path, more):
    ckpt, out = tiny(tmp_path, "lora", more), tmp_path / "out"
    report = export(ckpt, out, form="timm")
    assert report.merged
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    own = merged(ckpt, model)
    assert model.state_dict().keys() == own.state_dict().keys()
    assert model.global_pool == own.global_pool
    assert model.pretrained_cfg["label_names"] == [f"class {i}" for i in range(10)]
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), own(x))
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 16, 16)


def test_handles_in_memory_and_the_model_as_it_was(tmp_path):
    """What acts is exported, of several handles all, from a model that trains; nothing of the model changes."""
    model = timm.create_model(EMBEDDED["vit"], pretrained=True, num_classes=3)
    first = vpeft.attach(model, "lora", rank=2, targets=["fc1"], name="first")
    second = vpeft.attach(model, "lora", rank=1, targets=["fc2"], blocks=[0], name="second")
    off = vpeft.attach(model, "vpt_deep", name="off")
    for handle in (first, second, off):
        randomise(handle, 0.1)
    vpeft.activate(model, ["first", "second"])
    second.train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    export(first, tmp_path / "out", form="timm")
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert vpeft.active(model) == ["first", "second"]
    off.detach()
    with pytest.raises(vpeft.MethodError, match="'off' was detached"):
        export(off, tmp_path / "other", form="torch")
    x, other = torch.randn(2, 3, 28, 28), timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    model.eval()
    with torch.no_grad():
        assert (other(x) - model(x)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_family_has_a_timm_folder(tmp_path, architecture):
    name, options = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    handle = vpeft.attach(timm.create_model(name, **options), "lora")
    scatter(handle.model.named_parameters())
    randomise(handle)
    assert export(handle, tmp_path / "a", form="timm", model_args=options).merged
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architecture"] == name


def test_what_timm_does_not_build_again_is_refused(tmp_path):
    """Arguments that nobody remembers, foreign architectures, other types; nothing is left."""
    model = make("vit")
    handle = vpeft.attach(model, "lora")
    randomise(handle)
    if hasattr(model, "_model_args"):
        del model._model_args  # as timm 1.0.20 leaves it
    with pytest.raises(vpeft.VpeftError, match="model_args"):
        export(handle, tmp_path / "a", form="timm")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    with pytest.raises(vpeft.UnsupportedModelError, match=r"norm_layer.*cannot hold"):
        export(handle, tmp_path / "a", form="timm", model_args=small | {"norm_layer": torch.nn.LayerNorm})
    double = vpeft.attach(make("vit", dtype=torch.float64), "lora")
    randomise(double)
    with pytest.raises(vpeft.UnsupportedModelError, match="float64"):
        export(double, tmp_path / "a", form="timm", model_args=small)
    biased = vpeft.attach(make("vit", qkv_bias=False), "ssf")  # which gives it a bias when it is merged
    with pytest.raises(vpeft.UnsupportedModelError, match=r"Unexpected key.*blocks\.0\.attn\.qkv\.bias"):
        export(biased, tmp_path / "a", form="timm", model_args=small | {"qkv_bias": False})
    model.pretrained_cfg["architecture"] = "vit_of_mine"
    with pytest.raises(vpeft.UnsupportedModelError, match="none of timm's own"):
        export(handle, tmp_path / "a", form="timm", model_args=small)
    assert list(tmp_path.iterdir()) == []


# ---- programs ----


def outputs_of(ckpt: Path) -> dict[int, torch.Tensor]:
    return of_checkpoint(ckpt, None).outputs()


def check_program(ckpt: Path, out: Path, form: str, **options) -> dict:
    """Export, read with torch or onnxruntime alone, compare at batches of 1, 2, 3, 5 and 7; the description."""
    report = export(ckpt, out, form=form, **options)
    print(report)  # with pytest -s: what the table in a report is made of
    assert report.differences.keys() == {1, 2, 5}
    source = of_checkpoint(ckpt, None)
    if form == "torch":
        inside = {"vpeft.json": ""}
        program = torch.export.load(str(out), extra_files=inside).module()
        described = json.loads(inside["vpeft.json"])
    else:
        import onnx
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        program = lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])  # noqa: E731
        held = {p.key: p.value for p in onnx.load(str(out)).metadata_props}
        described = json.loads(held["vpeft"])
        assert json.loads(held["class_names"]) == described["class_names"]
        assert [o.name for o in session.get_outputs()] == ["output"]
    assert described == json.loads(out.with_name(f"{out.name}.json").read_text())
    assert described["input_size"] == list(source.leaving.size)
    for batch in (1, 2, 3, 5, 7):
        x = source.inputs(batch)
        with torch.no_grad():
            wanted = source.leaving.module(x)
        found = program(x)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max()), batch
    return described


@pytest.mark.parametrize(
    ("form", "method"),
    [("torch", "vpt_deep"), pytest.param("onnx", "lora", marks=pytest.mark.slow), pytest.param("torch", "lora", marks=pytest.mark.slow),
     pytest.param("onnx", "vpt_deep", marks=pytest.mark.slow)],
)  # fmt: skip
def test_programs_of_classifiers(tmp_path, form, method):
    ckpt = tiny(tmp_path, method)
    described = check_program(ckpt, tmp_path / "model", form)
    assert described["class_names"] == [f"class {i}" for i in range(10)]
    assert described["preprocessing"].keys() >= {"mean", "std", "interpolation", "crop_pct"}
    if method == "lora":
        assert not export(ckpt, tmp_path / "model", form=form, merge="no", overwrite=True).merged


SEGMENTATION = """
task: segmentation
model:
  name: vit_tiny_patch16_224
  pretrained: true
  img_size: 32
  kwargs: {patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}
method: {name: lora}
data: {source: scenes, batch_size: 4}
seg: {head: fcn, crop: 32, scenes: {train: 8, val: 4, test: 4, size: 40}}
train: {epochs: 1, batch_size: 4}
"""
SAN = ["seg.head=san", "seg.options={width: 16, depth: 4, heads: 2, queries: 5, hidden: 8, patch: 8, tower_ratio: 0.5, loss: {points: 32}}",
       "model.img_size=16"]  # fmt: skip
HEADS = [[], ["seg.head=upernet", "seg.options.channels=16", "seg.pyramid=feature2pyramid", "method.name=adaptformer"],
         ["seg.head=segmenter", "seg.aux=[0]", "method.name=vpt_deep"], ["seg.head=setr_pup", "seg.mode=slide", "seg.stride=20"],
         ["seg.head=psp", "seg.options.channels=16"], [*SAN, "method.name=linear"], [*SAN, "method.name=lora"]]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("overrides", HEADS, ids=lambda v: "-".join(v) or "fcn")
def test_programs_of_segmentation(tmp_path, form, overrides):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    save_file(timm.create_model("vit_tiny_patch16_224", **small).state_dict(), tmp_path / "vit.safetensors")
    root = fashion_root(tmp_path / "fashion")
    more = [f"data.root={root}", f"model.checkpoint={tmp_path / 'vit.safetensors'}"]
    ckpt = trained(tmp_path, SEGMENTATION, *more, *overrides)
    described = check_program(ckpt, tmp_path / "model", form)
    assert described["segmentation"]["mode"] in ("whole", "slide")
    assert described["outputs"].endswith("(B, classes, H, W)")
    with pytest.raises(vpeft.UnsupportedModelError, match="task=segmentation"):
        export(ckpt, tmp_path / "folder", form="timm")


VIDEO = """
task: video
model: {name: vit_micro_patch4_28.vpeft_fashion, pretrained: true}
method: {name: bitfit}
data: {source: motion, batch_size: 5}
video: {frames: 2, sampling: dense, motion: {train: 10, test: 5, frames: 4}}
train: {epochs: 1, batch_size: 8, select: last}
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize(
    "overrides", [[], ["method.name=aim", "method.options.frames=2"], ["method.name=st_adapter", "method.options.frames=2", "video.pool=before"], ["video.mode=joint", "method.name=lora"]],
    ids=lambda v: "-".join(v) or "bitfit",
)  # fmt: skip
def test_programs_of_clips(tmp_path, form, overrides):
    ckpt = trained(tmp_path, VIDEO, f"data.root={tmp_path / 'clips'}", *overrides)
    described = check_program(ckpt, tmp_path / "model", form)
    assert described["input_size"] == [3, 2, 28, 28]
    with pytest.raises(vpeft.UnsupportedModelError, match="task=video"):
        export(ckpt, tmp_path / "folder", form="timm")


# ---- what is refused, and what is left ----


def test_everything_is_checked_before_the_model_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vpeft.export.run.of_checkpoint", None)  # building would fail otherwise
    ckpt, there = tmp_path / "a.safetensors", tmp_path / "there"
    ckpt.write_bytes(b"x")
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for arguments, message in (
        (["--format", "onxx", "--out", tmp_path / "b"], "--format: 'onxx'; did you mean 'onnx'"),
        (["--format", "torch", "--out", tmp_path / "b", "--merge", "maybe"], "--merge: 'maybe'"),
        (["--format", "timm", "--out", tmp_path / "b", "--merge", "no"], "--merge no: a timm folder holds weights alone"),
        (["--format", "torch", "--out", ckpt, "--overwrite"], "is the checkpoint"),
        (["--format", "timm", "--out", there], "there is there already; --overwrite"),
        (["--format", "timm", "--out", there, "--overwrite"], r"no timm folder that export wrote \(notes\.txt\)"),
        (["--format", "torch", "--out", there], "there is there already"),
        (["--format", "torch", "--out", there, "--overwrite"], "there is no file"),
    ):
        assert run("--ckpt", ckpt, *arguments) == 2
        assert re.search(message, capsys.readouterr().err), arguments
    assert (there / "notes.txt").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("--ckpt", ckpt, "--format", "onnx", "--out", tmp_path / "b") == 2
    assert r"pip install 'vpeft[export]'" in capsys.readouterr().err


def test_a_folder_that_export_did_not_write_stays(tmp_path, capsys, monkeypatch):
    """Any download from the Hub has the two names; and what is read from must not go either."""
    monkeypatch.setattr("vpeft.export.run.of_checkpoint", None)  # building would fail otherwise
    there, ckpt = tmp_path / "there", tmp_path / "a.safetensors"
    there.mkdir()
    ckpt.write_bytes(b"x")
    (there / "model.safetensors").write_bytes(b"mine")
    arguments = ["--format", "timm", "--out", there, "--overwrite"]
    for config in ("{", "[]", '{"architecture": "vit_tiny_patch16_224"}'):
        (there / "config.json").write_text(config)
        assert run("--ckpt", ckpt, *arguments) == 2
        assert "no timm folder that export wrote (config.json does not say so)" in capsys.readouterr().err
    (there / "config.json").write_text('{"written_by": "vpeft export"}')
    for more, message in (
        (["--ckpt", there / "model.safetensors"], "holds the checkpoint model.safetensors"),
        (["--ckpt", ckpt, "--checkpoint", there / "model.safetensors"], "holds the file of weights model.safetensors"),
    ):
        assert run(*more, *arguments) == 2
        assert message in capsys.readouterr().err
    assert (there / "model.safetensors").read_bytes() == b"mine"


def test_what_came_there_meanwhile_stays(tmp_path, monkeypatch):
    """The target is looked at again just before it would go."""
    ckpt, out = tiny(tmp_path), tmp_path / "out"
    verify = vpeft.export.folder.verify

    def busy(*arguments):
        verify(*arguments)
        out.mkdir()
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr("vpeft.export.folder.verify", busy)
    with pytest.raises(vpeft.ConfigError, match="no timm folder that export wrote"):
        export(ckpt, out, form="timm", overwrite=True)
    assert not list(tmp_path.glob(".*"))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_description_never_stands_beside_another_program(tmp_path, monkeypatch):
    ckpt, out, seen = tiny(tmp_path), tmp_path / "model.pt2", []
    out.write_bytes(b"older")
    (tmp_path / "model.pt2.json").write_text("of the older")
    replace = os.replace

    def watched(source, target):
        seen.append((Path(target).name, (tmp_path / "model.pt2.json").exists()))
        replace(source, target)

    monkeypatch.setattr("vpeft.files.os.replace", watched)
    export(ckpt, out, form="torch", overwrite=True)
    assert seen == [("model.pt2", False), ("model.pt2.json", False)]
    assert json.loads((tmp_path / "model.pt2.json").read_text())["task"] == "classification"


def test_a_method_that_does_not_merge_has_no_timm_folder(tmp_path, capsys):
    ckpt = saved(tmp_path, "vit", "vpt_deep")
    assert run("--ckpt", ckpt, "--format", "timm", "--out", tmp_path / "out") == 2
    assert re.search(r"MethodError: .*cannot be merged.*choose the format torch or onnx", capsys.readouterr().err)
    with pytest.raises(vpeft.MethodError, match="cannot be merged"):
        export(ckpt, tmp_path / "out", form="torch", merge="yes")
    assert [p.name for p in tmp_path.iterdir()] == [ckpt.name]


@pytest.mark.parametrize("form", ["timm", pytest.param("torch", marks=pytest.mark.slow)])
def test_what_differs_is_not_left_behind(tmp_path, monkeypatch, form):
    """The older export stays, whole, and nothing beside it."""
    ckpt, out = tiny(tmp_path), tmp_path / "out" / "model"
    export(ckpt, out, form=form)
    state = {p: p.read_bytes() for p in sorted(out.parent.rglob("*")) if p.is_file()}
    monkeypatch.setattr("vpeft.export.run.BOUND", {torch.float32: -1.0})
    with pytest.raises(vpeft.MethodError, match=r"at most .* is let through.*was not written"):
        export(ckpt, out, form=form, overwrite=True)
    assert {p: p.read_bytes() for p in sorted(out.parent.rglob("*")) if p.is_file()} == state
    monkeypatch.undo()
    assert export(ckpt, out, form=form, overwrite=True).differences
    assert {p for p in out.parent.rglob("*") if p.is_file()} == state.keys()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm", "torch", "onnx"])
def test_a_full_disk_is_said_in_a_line_and_nothing_is_left(tmp_path, form):
    """As a limit on the size of files has it."""
    ckpt = saved(tmp_path, "vit", "lora")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); from vpeft.cli import main; main()"
    )
    arguments = ["export", "--ckpt", ckpt, "--format", form, "--out", tmp_path / "out" / "model"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^WriteError: .*out/model\S* cannot be written: .*too large", done.stderr, re.M | re.I)
    assert ".tmp" not in done.stderr
    assert not any((tmp_path / "out").iterdir())


def test_what_onnxruntime_cannot_run_is_said_in_a_line(tmp_path):
    model = make("vit").to(torch.bfloat16)
    handle = vpeft.attach(model, "lora")
    with pytest.raises(UnsupportedModelError, match="onnxruntime has no bfloat16"):
        export(handle, tmp_path / "o.onnx", form="onnx")
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(UnsupportedModelError, match="onnxruntime does not run this model"):
        run_onnx(tmp_path / "no.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["no.onnx"]


def test_a_checkpoint_of_a_zoo_is_exported(tmp_path, monkeypatch):
    from tests.zoo.conftest import written
    from vpeft.zoo.adding import add

    monkeypatch.setenv("VPEFT_CACHE", str(tmp_path / "cache"))
    add([written(tmp_path, 1)], "a.linear", folder=tmp_path / "zoo")
    monkeypatch.setenv("VPEFT_ZOO", str(tmp_path / "zoo"))
    assert run("--ckpt", "zoo:a.linear", "--format", "timm", "--out", tmp_path / "o") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'o'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
