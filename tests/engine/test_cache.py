"""The frozen-feature cache: the same weights as without it, and refusals where it would be wrong."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import vpeft
from tests.support.models import SHORT_SWEEP, attached, images, make, randomise
from vpeft.engine.cache import CacheError, FeatureCache, why_not
from vpeft.engine.config import load_config
from vpeft.engine.train import train
from vpeft.methods import METHODS

VIT = [
    "model.name=vit_tiny_patch16_224", "model.img_size=16",
    "model.kwargs={patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}",
]  # fmt: skip
SWIN = [
    "model.name=swin_tiny_patch4_window7_224", "model.img_size=32",
    "model.kwargs={window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 2]}",
]  # fmt: skip
LORA = ["method.name=lora", "method.options={blocks: 1, rank: 2}"]
CASES = {
    "probe": ["method.name=linear"],
    "last block": ["method.name=partial", "method.options={k: 1}"],
    "dropout above": ["method.name=adaptformer", "method.options={blocks: 1, bottleneck: 4}"],
    "accumulated": [*LORA, "train.accumulate=3"],
    "two runs a step": ["method.name=adamix", "method.options={blocks: 1, bottleneck: 4}"],
    "bf16": [*LORA, "train.precision=bf16"],
    "swin, second stage": [*SWIN, "method.name=adaptformer", "method.options={blocks: '2-3', bottleneck: 4}"],
    "swin, convolutions": [*SWIN, "method.name=convpass", "method.options={blocks: 3, bottleneck: 4}"],
    "swin, probe": [*SWIN, "method.name=linear"],
}


@pytest.fixture
def tiny(tmp_path):
    """Makes a configuration of seconds, a ViT's unless the overrides name another model."""
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"output: {tmp_path / 'runs'}\nmodel: {{pretrained: false}}\noptim: {{lr: 5.0e-3}}\n"
        "data: {source: digits, val_size: 100, batch_size: 400}\ntrain: {epochs: 2, batch_size: 100}\n"
    )

    def make_config(*overrides: str):
        model = [] if any(o.startswith("model.name=") for o in overrides) else VIT
        return load_config(file, [*model, *overrides])

    return make_config


def trained(config) -> dict[str, torch.Tensor]:
    train(config)
    return load_file(f"{config.output}/{config.name}/last.safetensors")


ON_DISK = ("dropout above", "swin, second stage")  # the other cases are in memory here; both kinds of all in the slow suite
SHORT = ("probe", "bf16", *ON_DISK)


@pytest.mark.parametrize(
    ("mode", "case"),
    [
        pytest.param(mode, case, marks=() if case in SHORT and (mode == "disk") == (case in ON_DISK) else pytest.mark.slow)
        for mode in ("memory", "disk")
        for case in CASES
    ],
)
def test_trains_the_same_weights_bit_for_bit(tiny, mode, case):
    plain = trained(tiny(*CASES[case], "name=plain"))
    cached = trained(tiny(*CASES[case], "name=cached", f"cache.mode={mode}"))
    assert plain.keys() == cached.keys()
    assert all(torch.equal(plain[n], cached[n]) for n in plain)


def test_fewer_bits_change_little(tiny):
    options = LORA
    plain = trained(tiny(*options, "name=plain"))
    half = trained(tiny(*options, "name=half", "cache.mode=memory", "cache.dtype=fp16"))
    assert any(not torch.equal(plain[n], half[n]) for n in plain)
    assert all(torch.allclose(plain[n], half[n], atol=0.03) for n in plain)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.drop_path=0.1"], "choose model.drop_path=0 and model.drop=0, or cache.mode=off"),
        (["augment.enabled=true"], "choose augment.enabled=false, or cache.mode=off"),
        (["train.compile=true"], "choose train.compile=false, or cache.mode=off"),
    ],
)
def test_what_stored_features_cannot_give_is_refused_with_the_choice(tiny, overrides, message):
    with pytest.raises(vpeft.ConfigError, match=message):
        tiny("cache.mode=memory", *overrides)
    assert tiny("cache.mode=auto", *overrides).cache.mode == "auto"


def test_a_method_that_starts_at_the_first_block(tiny):
    with pytest.raises(CacheError, match=r"acts from blocks\.0 on"):
        train(tiny("method.name=lora", "cache.mode=memory"))
    metrics = train(tiny("method.name=lora", "cache.mode=auto", "name=auto", "train.epochs=1"))
    assert metrics["epoch"] == 1
    assert tiny("cache.mode=off").cache.mode == "off"


def test_budget(tiny, tmp_path):
    options = [*LORA, "cache.budget_gb=1e-6", "train.epochs=1"]
    with pytest.raises(CacheError, match=r"take 0\.00 GB, more than 0\.00 GB; raise cache\.budget_gb"):
        train(tiny(*options, "cache.mode=memory"))
    train(tiny(*options, "cache.mode=auto", "name=spilled"))
    assert "in disk" in (tmp_path / "runs" / "spilled" / "console.log").read_text()


def loader_of(model, samples=12, seed=1):
    from vpeft.data import make_loader

    x = images(model, samples, seed=seed)
    data = torch.utils.data.TensorDataset(x, torch.arange(samples) % 5)
    return make_loader(data, 4, train=True)


def on_disk(handle, folder, loader):
    handle.eval()
    return FeatureCache(handle, mode="disk", folder=folder).fill(loader, progress=False)


def test_a_cache_on_disk_is_found_again_and_follows_its_causes(tmp_path, monkeypatch):
    model = make("vit")
    handle = attached(model, "partial")
    first = on_disk(handle, tmp_path, loader_of(model))
    (folder,) = tmp_path.iterdir()
    calls = []
    compute = FeatureCache._compute
    monkeypatch.setattr(FeatureCache, "_compute", lambda self, x: calls.append(1) or compute(self, x))
    again = on_disk(handle, tmp_path, loader_of(model))
    assert len(calls) == 1, "one batch, for the shapes"
    assert all(torch.equal(first.features[k], again.features[k]) for k in first.features)
    assert torch.equal(first.labels, again.labels)
    on_disk(handle, tmp_path, loader_of(model, seed=2))  # other images
    assert len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 1e-3  # another backbone
    on_disk(handle, tmp_path, loader_of(model))
    assert len(list(tmp_path.iterdir())) == 3
    assert folder.is_dir()


def test_a_crash_leaves_nothing_that_is_trusted(tmp_path, monkeypatch):
    model = make("vit")
    handle = attached(model, "partial")
    compute, calls = FeatureCache._compute, []

    def crash(self, x):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return compute(self, x)

    monkeypatch.setattr(FeatureCache, "_compute", crash)
    with pytest.raises(RuntimeError, match="killed"):
        on_disk(handle, tmp_path, loader_of(model))
    assert all("partial" in p.name for p in tmp_path.iterdir())
    whole = on_disk(handle, tmp_path, loader_of(model))
    assert whole.where == "disk"
    expected = {}
    model.blocks[1].register_forward_hook(lambda m, a, out: expected.update(x=out))
    with torch.no_grad():
        model(torch.stack([loader_of(model).dataset[0, i][0] for i in range(12)]))
    assert torch.allclose(whole.features[1], expected["x"], atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "vit_reg", "swin"])
def test_playing_runs_nothing_below_and_leaves_nothing_behind(kind):
    model = make(kind)
    handle = attached(model, "partial")
    handle.eval()
    loader = loader_of(model)
    cached = FeatureCache(handle).fill(loader, progress=False).loader(loader)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    real = list(loader)
    ran = []
    first = handle.sites.blocks[0].attn.module
    hook = first.register_forward_hook(lambda *a: ran.append(1))
    with torch.no_grad():
        expected = [model(x) for x, _ in real]
        ran.clear()
        for (x, y), logits, (_, labels) in zip(cached, expected, real, strict=True):
            assert torch.allclose(model(x), logits, atol=1e-5)
            assert torch.equal(y, labels)
            assert x.untyped_storage().nbytes() <= 8 * len(x), "stand-in images take no memory"
    assert not ran
    hook.remove()
    stopped = iter(cached)
    next(stopped)
    stopped.close()
    assert not any("forward" in vars(m) for m in model.modules())
    assert {n: dict(vars(m)) for n, m in model.named_modules()}.keys() == before.keys()
    with torch.no_grad():
        assert torch.equal(model(real[0][0]), expected[0])


def test_methods_that_read_every_block_keep_it_running():
    handle = attached(make("vit"), "vqt")
    assert handle.boundary == "norm"
    assert handle.cache_needs.first == 0
    assert "nothing frozen lies below" in why_not(handle)


@pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)
def test_every_method_computes_the_same_from_the_cache(method, kind):
    """Restricted to the last block, where a method has that option, so that something lies below it."""
    model = make(kind)
    last = {"blocks": [-1]} if "blocks" in {f.name for f in dataclasses.fields(METHODS[method])} else {}
    try:
        handle = attached(model, method, **last)
    except vpeft.VpeftError:  # a method whose blocks must be many
        handle = attached(model, method)
    randomise(handle)
    handle.eval()
    if why_not(handle):
        with pytest.raises(CacheError, match="no features to cache"):
            FeatureCache(handle)
        return
    loader = loader_of(model)
    cached = FeatureCache(handle).fill(loader, progress=False).loader(loader)
    with torch.no_grad():
        direct = [model(x) for x, _ in loader]
        played = [model(x) for x, _ in cached]
    assert all(torch.equal(a, b) for a, b in zip(direct, played, strict=True))
