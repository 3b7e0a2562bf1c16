"""The handle: what users call, and what they are told when it cannot be."""

import pytest
import torch
from models import images, make, randomise

import vpeft


def test_unknown_things_name_the_nearest():
    model = make("vit")
    for method, options, message in (
        ("adaptfromer", {}, "unknown method 'adaptfromer'; did you mean 'adaptformer'"),
        ("lora", {"r": 4}, "lora has no hyper-parameter 'r'"),
        ("lora", {"rnk": 4}, "did you mean 'rank'"),
        ("lora", {"rank": 4.5}, "lora.rank: 4.5 is no int"),
        ("lora", {"rank": -4}, "-4 is no size"),
        ("lora", {"scale": 1.0, "alpha": 2.0}, "scale or alpha, not both"),
        ("lora", {"dropout": 1.5}, "no probability"),
        ("lora", {"preset": "noha"}, "no preset 'noha'; did you mean 'noah'"),
        ("adapter", {"variant": "pots"}, "'pots' is no one of 'post', 'houlsby'"),
        ("lora", {"name": "a b"}, "letters, digits and underscores"),
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
