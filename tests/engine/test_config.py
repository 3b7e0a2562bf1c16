"""Typed configurations: what is refused, with which words."""

import gzip

import pytest

import vpeft
from vpeft.engine import recipes
from vpeft.engine.config import from_container, load_config
from vpeft.engine.train import check, train
from vpeft.tasks.classification.task import ImageClassification

CONFIG = vpeft.ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochz=3", r"train\.epochz: unknown key; did you mean 'epochs'"),
        ("trian.epochs=3", r"trian: unknown key; did you mean 'train'"),
        ("train.epochs=many", r"train\.epochs: .*many"),
        ("train.epochs=0", r"train\.epochs: 0 is impossible; it must be at least 1"),
        ("optim.lr=-1", r"optim\.lr: -1.* is impossible"),
        ("train.precision=fp8", r"train\.precision: 'fp8' is not one of fp32, bf16, fp16"),
        ("wandb.mode=ofline", r"wandb\.mode: 'ofline' is not one of .*did you mean 'offline'"),
        ("train=5", r"train: expected a mapping"),
        ("augment.scale=[1.0, 0.5]", r"augment\.scale: expected two numbers"),
        ("augment.scale_jitter=[1.15]", r"augment\.scale_jitter: \[1\.15\] has 1 entries; it must have 2"),
        ("augment.scale=[-0.5, 0.5]", r"augment\.scale\[0\]: -0\.5 is impossible; it must be above 0"),
        ("optim.lr=.nan", r"optim\.lr: nan is impossible"),
        ("optim.weight_decay=.inf", r"optim\.weight_decay: inf is impossible"),
        (
            "train.epochs=9999999999",
            r"train\.epochs: 9999999999 is impossible; it must be at least 1 and at most 1000000 \(epochs\)",
        ),
        ("seed=4294967296", r"seed: 4294967296 is impossible"),
        ("video.motion.size=7", r"video\.motion\.size: 7 is impossible; it must be at least 14"),
        ("seg.losses={ce: -1.0}", r"seg\.losses\.ce: -1\.0 is impossible"),
        ("data.std=[0.5, 0.0, 0.5]", r"data\.std\[1\]: 0\.0 is impossible"),
        ("data.root=${data.rot}", r"data\.root: Interpolation key 'data\.rot' not found"),
        ("augment.mixup=0.8", r"augment\.enabled: mixup and cutmix need"),
        ("schedule.warmup_epochs=50", r"schedule\.warmup_epochs: 50 must be below"),
        ("noequals", r"override 'noequals': expected key\.sub=value"),
        ("model.img_size=0", r"model\.img_size: 0 is impossible"),
    ],
)
def test_refused_while_reading(tiny_file, override, message):
    with pytest.raises(CONFIG, match=message):
        load_config(tiny_file, [override])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.name=vit_tiny_patch16_242"], CONFIG, r"model\.name: timm has no .*did you mean 'vit_tiny_patch16_224'"),
        (["model.name=vit_tiny_patch16_224.augreg_in22k", "model.pretrained=true"], CONFIG,
         r"model\.name: .* no pretrained tag 'augreg_in22k'; did you mean 'augreg_in21k'"),
        (["method.name=adaptfromer", "method.options={}"], CONFIG, r"method: unknown method .*did you mean 'adaptformer'"),
        (["method.options.ranks=4"], CONFIG, r"method: lora has no hyper-parameter 'ranks'; did you mean 'rank'"),
        (["method.options.rank=four"], CONFIG, r"method: lora\.rank: 'four' is no int"),
        (["data.source=digit"], vpeft.DataError, r"data\.source: 'digit' is not a known source; did you mean 'digits'"),
        (["data.source=folder", "data.root=/nowhere"], vpeft.DataError, r"data\.root: folder '/nowhere' does not exist"),
        (["data.source=fashion_mnist", "data.root=/nowhere"], vpeft.DataError, r"/nowhere/.* does not exist; point data.fashion_mnist at"),
        (["train.precision=fp16"], CONFIG, r"train\.precision: fp16 needs a GPU"),
        (["data.val_split=val"], vpeft.DataError, r"data\.val_size: give a validation split"),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_built(tiny, overrides, error, message, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("a model was built"))
    with pytest.raises(error, match=message):
        check(tiny(*overrides))
    with pytest.raises(error):
        train(tiny(*overrides))


def test_class_count_must_fit(tiny):
    with pytest.raises(vpeft.DataError, match=r"data\.num_classes: 7 asked for, but 'digits' has 10"):
        ImageClassification(tiny("data.num_classes=7")).open_data()
    with pytest.raises(vpeft.DataError, match=r"data\.classes: 'digits' has no class a, b, c"):
        ImageClassification(tiny("data.classes=[a,b,c]")).open_data()
    with pytest.raises(vpeft.DataError, match="leaves nothing"):
        ImageClassification(tiny("data.val_size=1000")).open_data()


def test_a_leading_tilde_is_the_users_folder(tiny_file, tmp_path, monkeypatch):
    """As behind ``key=``, where a shell does not see to it; and in a file, which no shell reads."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tiny_file.write_text(tiny_file.read_text() + "cache: {folder: ~/features}\n")
    config = load_config(tiny_file, ["output=~/runs", "name=~x", "method.options={}"])
    assert config.output == str(tmp_path / "home/runs")
    assert config.cache.folder == str(tmp_path / "home/features")
    assert config.name == "~x"
    assert load_config(tiny_file, ["data.root=null"]).data.root is None


def test_base_files_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {epochs: 7, batch_size: 32}\noptim: {lr: 0.5}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {epochs: 9}\n")
    config = load_config(tmp_path / "b.yaml", ["optim.lr=0.25"])
    assert (config.train.epochs, config.train.batch_size, config.optim.lr) == (9, 32, 0.25)
    assert from_container({"train": {"epochs": 3}}).train.epochs == 3
    (tmp_path / "c.yaml").write_text("base: c.yaml\n")
    with pytest.raises(CONFIG, match="lead back"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(CONFIG, match=r"does not exist; did you mean '.*b\.yaml'"):
        load_config(tmp_path / "bb.yaml")


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_shipped_configurations_are_valid(tmp_path, part):
    """Every file in configs/, every third at a time; the one data set that is not in a Python package gets a stand-in of four small files."""
    from tests.support.places import ROOT
    from vpeft.bench.config import load_routing_config, load_tables
    from vpeft.search.config import load_search_config, supernet_config, winner_config

    for stem in ("train", "t10k"):
        for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header + 2 * size)))
    files = sorted(f for f in (ROOT / "configs").rglob("*.yaml") if "_base_" not in f.parts)[part::3]
    assert len(files) > 10
    for file in files:
        if "spaces" in file.parts:  # of sweeps: tests/sweeps/test_space.py
            continue
        if "bench" in file.parts:
            load = load_routing_config if file.stem.startswith("routing") else load_tables
            load(file, ["device=cpu"])  # which those for a GPU refuse where there is none
            continue
        if "noah" in file.parts and "alone" not in file.parts:
            config = load_search_config(file)
            stages = [supernet_config(config), winner_config(config, None)]
        else:
            stages = [load_config(file)]
        for config in stages:
            _check_shipped(file, config, tmp_path)


def _check_shipped(file, config, tmp_path):
    if config.data.source in ("fashion_mnist", "scenes"):
        config.data.root = str(tmp_path)
    suite = file.parent.name == "configs" and file.stem in recipes.names()
    if suite or {"published", "examples", "vtab"} & set(file.parts):  # sound up to the data, which nobody has here
        with pytest.raises(vpeft.DataError, match=r"data\.root: folder '.*' does not exist"):
            check(config)
    else:
        check(config)


def test_a_changed_name_drops_the_options_of_the_old_one(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("method: {name: lora, options: {rank: 3, dropout: 0.1}}\noptim: {name: adamw, kwargs: {eps: 1.0e-6}}\n")
    assert dict(load_config(file).method.options) == {"rank": 3, "dropout": 0.1}
    assert capsys.readouterr().err == ""
    config = load_config(file, ["method.name=linear", "optim.name=sgd"])
    assert (dict(config.method.options), dict(config.optim.kwargs)) == ({}, {})
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "method.name=linear: the options of lora are dropped (rank, dropout)",
        "optim.name=sgd: the kwargs of adamw are dropped (eps)",
    ]
    for items in (["method.name=ssf", "method.options.blocks=8-11"], ["method.options.blocks=8-11", "method.name=ssf"]):
        assert dict(load_config(file, items).method.options) == {"blocks": "8-11"}
    assert dict(load_config(file, ["method.name=lora", "method.options.rank=4"]).method.options) == {
        "rank": 4,
        "dropout": 0.1,
    }
    child = tmp_path / "b.yaml"
    child.write_text("base: a.yaml\nmethod: {name: adaptformer, options: {bottleneck: 4}}\n")
    assert dict(load_config(child).method.options) == {"bottleneck": 4}


def test_an_empty_mapping_empties(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "method: {name: lora, options: {rank: 3}}\nmodel: {kwargs: {depth: 2}}\noptim: {kwargs: {eps: 1.0e-6}}\n"
    )
    config = load_config(file, ["method.options={}", "model.kwargs={}", "optim.kwargs={}"])
    assert (dict(config.method.options), dict(config.model.kwargs), dict(config.optim.kwargs)) == ({}, {}, {})
    child = tmp_path / "b.yaml"
    child.write_text("base: a.yaml\nmethod: {options: {}}\ntrain: {}\n")
    assert dict(load_config(child, ["train.epochs=3"]).method.options) == {}
    assert dict(load_config(file, ["method.options={dropout: 0.2}"]).method.options) == {"rank": 3, "dropout": 0.2}
