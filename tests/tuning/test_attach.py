"""The handle: what users call, and what they are told when it cannot be."""

import pytest
import timm
import torch

import vpeft
from tests.support.models import images, make, randomise


def test_unknown_things_name_the_nearest():
    model = make("vit")
    for method, options, message in (
        ("adaptfromer", {}, "unknown method 'adaptfromer'; did you mean 'adaptformer'"),
        ("lora", {"r": 4}, "lora has no hyper-parameter 'r'"),
        ("lora", {"rnk": 4}, "did you mean 'rank'"),
        ("lora", {"rank": 4.5}, r"lora\.rank: 4\.5 is no int \| list\[int\]"),
        ("lora", {"rank": -4}, r"lora\.rank: -4 is impossible; it must be at least 0 and at most 65536"),
        ("lora", {"rank": [4, -4, 4]}, r"lora\.rank\[1\]: -4 is impossible"),
        ("lora", {"scale": 1.0, "alpha": 2.0}, "scale or alpha, not both"),
        ("lora", {"dropout": 1.5}, r"lora\.dropout: 1\.5 is impossible; it must be at least 0 and below 1 \(probability\)"),
        ("lora", {"preset": "noha"}, "no preset 'noha'; did you mean 'noah'"),
        ("adapter", {"variant": "pots"}, r"adapter\.variant: 'pots' is not one of post, houlsby.*did you mean 'post'"),
        ("lora", {"name": "a b"}, "letters, digits and underscores"),
        *(
            ("lora", {"name": n}, f"name: '{n}' is an attribute")
            for n in ("training", "forward", "hub", "trees", "_modules")
        ),
        ("partial", {"k": 9}, "9 blocks of a model that has 3"),
        ("bitfit", {"terms": ["nothing"]}, "no bias of VisionTransformer matches"),
        (3, {}, "expected a method's name, class or object, got int"),
    ):
        with pytest.raises(vpeft.MethodError, match=message):
            vpeft.attach(model, method, **options)
        assert not hasattr(model, "vpeft")
    assert all(p.requires_grad for p in model.parameters())


def test_three_ways_to_name_a_method():
    for method, options in (("lora", {"rank": 3}), (vpeft.LoRA, {"rank": 3}), (vpeft.LoRA(rank=3), {})):
        handle = vpeft.attach(make("vit"), method, **options)
        assert handle.method == vpeft.LoRA(rank=3)
    assert vpeft.attach(make("vit"), "linear_probe").method.name == "linear"
    with pytest.raises(vpeft.MethodError, match="not to both"):
        vpeft.attach(make("vit"), vpeft.LoRA(), rank=3)


def test_lists():
    assert {"lora", "adaptformer", "ssf", "vpt_deep", "full"} <= set(vpeft.list_methods())
    assert "lora" in vpeft.list_methods("reparameterisation")
    assert "lora" not in vpeft.list_methods("additive")
    with pytest.raises(vpeft.VpeftError, match="no category 'additiv'; did you mean 'additive'"):
        vpeft.list_methods("additiv")
    assert vpeft.describe("adaptformer").defaults["bottleneck"] == 64


def test_summary_tells_the_truth():
    model = make("vit")
    handle = vpeft.attach(model, "lora", rank=2, blocks="1-2")
    text = str(handle)
    own = 2 * 2 * 2 * (2 * 32)
    head = 33 * 5
    total = sum(p.numel() for p in model.parameters())
    assert f"trainable  {own:,} + {head:,} in the head, of {total:,}" in text
    assert "mergeable  yes" in text
    assert "gradient   reaches back to blocks.1" in text
    assert "blocks.*.attn.qkv.lora x2" in text
    assert "2106.09685" in text
    assert "merged" in str(handle.merge())
    handle.unmerge().detach()
    assert str(handle) == "lora: detached"


def test_users_own_loop(tmp_path):
    """README's first example, at a small size."""
    model = make("vit")
    peft = vpeft.attach(model, "adaptformer", bottleneck=8)
    optimizer = torch.optim.AdamW(peft.param_groups(lr=2e-2, weight_decay=0.05))
    x, labels = images(model, 5), torch.arange(5)
    peft.train()
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    peft.save(tmp_path / "five.safetensors")
    peft.eval()
    fresh = make("vit")
    vpeft.load(fresh, tmp_path / "five.safetensors").eval()
    assert torch.equal(fresh(x), model(x))


def test_two_of_the_same_tensors_cannot_both_be_on():
    model = make("vit")
    bitfit = vpeft.attach(model, "bitfit")
    randomise(bitfit)
    norm = vpeft.attach(model, "norm")
    randomise(norm)
    with pytest.raises(vpeft.MethodError, match=r"'norm' is enabled and has its own values of blocks\.0\.norm1\.bias"):
        bitfit.enable()
    norm.disable()
    bitfit.enable()


def test_stacked_methods_add_up():
    model = make("vit", dtype=torch.float64)
    x = images(model)
    one = vpeft.attach(model, "lora", name="one")
    randomise(one)
    two = vpeft.attach(model, "lora", name="two", targets=["k"])
    randomise(two)
    one.enable()
    both = model(x)
    with pytest.raises(vpeft.MethodError, match=r"another enabled method also acts on blocks\.0\.attn\.qkv"):
        one.merge()
    two.disable()
    one.merge()
    two_state = {n: t.clone() for n, t in two.state_dict().items()}
    plain = one.detach(keep_merged=True)
    two.detach()
    third = vpeft.attach(plain, "lora", targets=["k"])
    third.load_state_dict(two_state)
    assert (plain(x) - both).abs().max() < 1e-12


def test_merged_methods_refuse_what_would_go_wrong():
    model = make("vit")
    handle = vpeft.attach(model, "lora")
    handle.merge()
    with pytest.raises(vpeft.MethodError, match="unmerge"):
        vpeft.attach(model, "ssf")
    with pytest.raises(vpeft.MethodError, match="unmerge"):
        handle.load_state_dict(handle.state_dict())
    assert handle.merged
    handle.detach()
    handle = vpeft.attach(model, "lora")
    with pytest.raises(vpeft.MethodError, match=r"merge\(\) first"):
        handle.detach(keep_merged=True)
    handle.disable()
    with pytest.raises(vpeft.MethodError, match="disabled"):
        handle.merge()


def test_get_handle():
    model = make("vit")
    with pytest.raises(vpeft.MethodError, match="not attached"):
        vpeft.get_handle(model)
    vpeft.attach(model, "lora")
    vpeft.attach(model, "ssf")
    assert vpeft.get_handle(model, "lora").name == "lora"
    with pytest.raises(vpeft.MethodError, match="'lra' is not attached; did you mean 'lora'"):
        vpeft.get_handle(model, "lra")


def test_requires_grad_can_be_given_back():
    model = make("vit")
    first = vpeft.attach(model, "lora")
    vpeft.attach(model, "adaptformer")
    assert not any(p.requires_grad for p in first.parameters())
    first.requires_grad_().enable()
    assert all(p.requires_grad for p in first.parameters())


def test_merge_into_half_precision_is_cast_once():
    torch.manual_seed(0)
    model = make("vit")
    handle = vpeft.attach(model, "lora")
    randomise(handle, 0.05)
    weight = model.blocks[0].attn.qkv.weight.detach().to(torch.bfloat16)
    model.to(torch.bfloat16)
    delta = handle.root.get_submodule("blocks.0.attn.qkv.lora").delta()
    assert delta.dtype == torch.float32
    handle.merge()
    assert torch.equal(model.blocks[0].attn.qkv.weight, (weight.float() + delta).bfloat16())
    handle.unmerge()
    assert torch.equal(model.blocks[0].attn.qkv.weight, weight)


def test_moving_the_model_moves_the_method():
    model = make("vit")
    handle = vpeft.attach(model, "ssf")
    model.double()
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    assert model(images(model)).dtype == torch.float64


# ---- heads outside the model ----


class Outer(torch.nn.Module):
    """A dense head around a backbone."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        return self.head(self.backbone.forward_features(images)[:, 1:].mean(1))


def outside(seed):
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=0)
    torch.manual_seed(seed)
    return backbone, torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.BatchNorm1d(4))


def test_a_head_outside_the_model_trains_saves_and_loads(tmp_path):
    backbone, head = outside(1)
    handle = vpeft.attach(backbone, "lora", rank=2, heads={"decode": head})
    names = {f"decode.{n}" for n, _ in head.named_parameters()}
    assert {n for n, _ in handle.head_parameters()} == names
    grouped = {id(p): g for g in handle.param_groups(1.0, 0.1, head_lr=2.0) for p in g["params"]}
    assert all(grouped[id(p)]["lr"] == 2.0 for p in head.parameters())
    handle.train()
    assert [m.training for m in (head, head[1], backbone)] == [True, True, False]
    Outer(backbone, head)(torch.randn(3, 3, 32, 32))  # moves the running statistics
    file = handle.eval().save(tmp_path / "a.safetensors")
    assert not head.training
    other, fresh = outside(2)
    vpeft.load(other, file, heads={"decode": fresh})
    for (name, value), found in zip(head.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(value, found), name
    with pytest.raises(vpeft.CheckpointError, match=r"decode\.0\.bias.*heads="):
        vpeft.load(outside(2)[0], file)
    assert vpeft.load(outside(2)[0], file, head=False).head_state_dict() == {}


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (lambda m: {"decode": 3}, "no module but int"),
        (lambda m: {"decode": m.norm}, "part of the model"),
        (lambda m: {"blocks": torch.nn.Linear(1, 1)}, "no name in the model"),
    ],
)
def test_impossible_heads_are_refused(heads, words):
    backbone, _ = outside(1)
    with pytest.raises(vpeft.MethodError, match=words):
        vpeft.attach(backbone, "lora", heads=heads(backbone))
    assert not hasattr(backbone, "vpeft")


def test_calibration_measures_by_the_tasks_own_loss():
    backbone, head = outside(1)
    handle = vpeft.attach(backbone, "child_tuning_d", p=0.1, heads={"decode": head})
    outer = Outer(backbone, head)
    images, targets = torch.randn(4, 3, 32, 32), torch.randn(4, 4)

    def loss(model, inputs, wanted):
        return ((model(inputs) - wanted) ** 2).mean()

    handle.calibrate([(images, targets)], outer=outer, criterion=loss, progress=False)
    chosen = {n.removesuffix(".index"): t for n, t in handle.state_dict().items() if n.endswith(".index")}
    with handle.disable():
        backbone.requires_grad_(True)
        outer.train()
        names = [n for n, _ in backbone.named_parameters() if n in chosen]
        tensors = dict(backbone.named_parameters())
        gradients = torch.autograd.grad(loss(outer, images, targets), [tensors[n] for n in names])
    for name, gradient in zip(names, gradients, strict=True):
        clipped = (gradient * (1.0 / (gradient.norm() + 1e-6)).clamp(max=1)).square().flatten()
        taken = torch.zeros_like(clipped, dtype=torch.bool)
        taken[chosen[name].long()] = True
        assert not taken.any() or taken.all() or clipped[taken].min() >= clipped[~taken].max(), name
    assert sum(len(t) for t in chosen.values()) > 0
    with pytest.raises(vpeft.MethodError, match="does not hold the model"):
        handle.calibrate([(images, targets)], outer=head, progress=False)
    detached = vpeft.attach(outside(1)[0], "fish", variant="expect", ratio=0.9)
    with pytest.raises(vpeft.MethodError, match="one class label for each image"):
        detached.calibrate([(images, targets)], criterion=loss, progress=False)
