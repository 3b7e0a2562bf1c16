"""What holds for every registered method on a ViT, a ViT with LayerScale and registers, and a Swin."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import vpeft
from tests.support.models import (
    CASES,
    MODELS,
    REFUSED,
    SAMPLE,
    SHORT_SWEEP,
    SWEEP,
    THIRDS,
    UNREACHED,
    attached,
    images,
    make,
    randomise,
    scatter,
    train_steps,
)  # fmt: skip
from vpeft.methods import METHODS, create

sweep = pytest.mark.parametrize(("method", "kind"), SWEEP)
short_sweep = pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)
on_vit = pytest.mark.parametrize("method", [m for m, k in CASES if k == "vit"])


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("vpeft.")}


@pytest.mark.parametrize(("method", "kind"), sorted(REFUSED))
def test_refusals_say_why_and_leave_nothing(method, kind):
    model = make(kind)
    before = vars_of(model)
    with pytest.raises(vpeft.UnsupportedModelError, match=f"{method} on swin.*: .*"):
        vpeft.attach(model, method)
    assert vars_of(model) == before
    assert all(p.requires_grad for p in model.parameters())


@short_sweep
def test_names_and_class_stay(method, kind):
    model = make(kind)
    names, cls, forward = list(model.state_dict()), type(model), type(model).forward
    attached(model, method)
    assert [n for n in model.state_dict() if not n.startswith("vpeft.")] == names
    assert type(model) is cls
    assert type(model).forward is forward
    assert "forward" not in vars(model)


@sweep
def test_identity_at_start(method, kind):
    model = make(kind, dtype=torch.float64)  # some start at a distance that float32 cannot see
    x = images(model)
    bare = run(model, x)
    handle = attached(model, method)
    changed = (run(model, x) - bare).abs().max()
    if handle.method.starts_as_identity_on(handle.sites):
        assert changed == 0
    else:
        assert changed > 1e-13


@short_sweep
def test_only_the_method_and_the_head_train(method, kind):
    model = make(kind)
    handle = attached(model, method)
    own = {id(p) for p in handle.parameters()}
    head = {id(p) for p in model.get_classifier().parameters()} if handle.method.trains_head else set()
    assert {id(p) for p in model.parameters() if p.requires_grad} == own | head
    assert {id(p) for p in handle.trainable_parameters()} == own | head
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    largest = train_steps(model, handle)
    names = [n for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad]
    assert len(names) == len(largest)
    for name, gradient in zip(names, largest, strict=True):
        assert torch.isfinite(gradient), name
        assert (gradient > 0) != (UNREACHED.get((method, kind), "-") in name), name
    live = dict(model.named_parameters())
    assert all(torch.equal(live[n], value) for n, value in frozen.items())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def vars_of(model: nn.Module) -> dict:
    """Every attribute, hook and module of a model, to compare before and after."""
    found = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") and key not in ("_forward_hooks", "_forward_pre_hooks", "_modules"):
                value = sorted(value) if isinstance(value, dict) else repr(value)
            elif isinstance(value, dict):
                value = sorted(map(str, value))
            elif isinstance(value, nn.Module | torch.Tensor):
                value = id(value)
            found[path, key] = repr(value)
    return found


@short_sweep
def test_detach_leaves_nothing(method, kind):
    model = make(kind)
    next(model.parameters()).requires_grad_(False)
    x = images(model)
    bare, before, flags = run(model, x), vars_of(model), [p.requires_grad for p in model.parameters()]
    values = tensors(model)
    handle = attached(model, method)
    randomise(handle)
    assert not torch.equal(run(model, x), bare) or not list(handle.parameters())
    assert handle.detach() is model
    assert torch.equal(run(model, x), bare)
    assert vars_of(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, values[n]) for n, v in tensors(model).items())
    with pytest.raises(vpeft.MethodError, match="detached"):
        handle.enable()


@short_sweep
def test_save_load_is_bit_identical(method, kind, tmp_path):
    model = make(kind)
    handle = attached(model, method)
    train_steps(model, handle)
    handle.eval()
    expected = run(model, images(model))
    path = handle.save(tmp_path / "a.safetensors", class_names=list("abcde"))
    fresh = make(kind, num_classes=5)
    loaded = vpeft.load(fresh, path)
    loaded.eval()
    assert torch.equal(run(fresh, images(model)), expected)
    assert loaded.method == handle.method.exported(handle.root)[0]
    # In the file is what was trained, and at most as much again of what it started from or where it stands: nothing of the
    # backbone's size.
    own = sum(p.numel() for p in handle.trainable_parameters())
    assert path.stat().st_size < 8 * own + 40_000


@short_sweep
def test_state_dict_round_trip_is_strict(method, kind):
    model = make(kind)
    handle = attached(model, method)
    randomise(handle)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    assert not any(n.startswith("vpeft") for n in state)
    expected = run(model, images(model))
    other = make(kind)
    second = attached(other, method)
    second.load_state_dict(state)
    assert torch.equal(run(other, images(model)), expected)
    assert all(torch.equal(t, state[n]) for n, t in second.state_dict().items())
    with pytest.raises(vpeft.CheckpointError, match=r"unknown blocks\.0\.nothing"):
        second.load_state_dict(state | {"blocks.0.nothing": torch.zeros(1)})
    if state:
        name = sorted(state)[0]
        short = {n: t for n, t in state.items() if n != name}
        with pytest.raises(vpeft.CheckpointError, match="missing"):
            second.load_state_dict(short)
        second.load_state_dict(short, strict=False)
        with pytest.raises(vpeft.CheckpointError, match="shape"):
            second.load_state_dict(state | {name: torch.zeros(1, 2, 3)})


@short_sweep
def test_deepcopy_is_independent(method, kind):
    model = make(kind)
    handle = attached(model, method)
    randomise(handle)
    x = images(model)
    expected = run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), expected)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(0.1)
    assert torch.equal(run(twin, x), expected)
    copied = vpeft.get_handle(twin)
    moved = run(model, x)
    copied.detach()
    assert torch.equal(run(model, x), moved)
    assert not hasattr(twin, "vpeft")


@short_sweep
def test_pickling(method, kind):
    model = make(kind)
    randomise(attached(model, method))
    stream = io.BytesIO()
    pickle.dump(model, stream)
    again = pickle.loads(stream.getvalue())
    x = images(model)
    assert torch.equal(run(again, x), run(model, x))


COMPILED = {"dtl", "lora"}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in COMPILED else pytest.mark.slow) for m, k in CASES if k == "vit"]
)
def test_compiles_in_one_graph(method):
    model = make("vit")
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.eval()
    x = images(model)
    eager = model(x)
    grads = torch.autograd.grad(eager.square().sum(), list(handle.trainable_parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = compiled(x)
    assert torch.allclose(again, eager, atol=1e-5, rtol=1e-5)
    repeated = torch.autograd.grad(again.square().sum(), list(handle.trainable_parameters()))
    for a, b in zip(grads, repeated, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@short_sweep
def test_activation_checkpointing_gives_the_same_gradients(method, kind):
    model = make(kind, dtype=torch.float64)
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.train()
    x = images(model)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        loss = model(x).square().sum() + handle.penalty()  # a supernet's reaches what a sub-network has not
        gradients.append(torch.autograd.grad(loss, list(handle.trainable_parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@short_sweep
def test_bf16_autocast_runs(method, kind):
    model = make(kind)
    handle = attached(model, method)
    handle.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(model))
        loss = logits.float().square().sum()
    loss.backward()
    assert torch.isfinite(logits).all()
    assert any(p.grad is not None and torch.isfinite(p.grad).all() for p in handle.trainable_parameters())


def differentiated(handle: vpeft.Handle, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The model's output, and the gradient of every trained tensor, in float32."""
    named = {n: p for n, p in [*handle.named_parameters(), *handle.head_parameters()] if p.requires_grad}
    output = handle.model(x).float()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad((output * weights).sum(), list(named.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
    return output.detach(), {n: g.float() for n, g in gradients.items()}


@pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)
@pytest.mark.parametrize(
    "moved", [pytest.param(False, id="at its start", marks=pytest.mark.slow), pytest.param(True, id="moved")]
)
def test_half_precision_backbone(method, kind, moved):
    """Outputs and gradients are those of the same values in float32, up to bfloat16's three digits."""
    model = make(kind).to(torch.bfloat16)
    handle = attached(model, method)
    assert {p.dtype for p in handle.parameters()} <= {torch.bfloat16}
    if moved:
        randomise(handle, 0.05)
    handle.eval()
    twin, x = copy.deepcopy(model).float(), images(model)
    output, gradients = differentiated(handle, x)
    expected, exact = differentiated(vpeft.get_handle(twin), x.float())
    assert (output - expected).abs().max() < 0.1 * expected.std()
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        # A method that starts at zero holds back some gradients at first: in float32 too.
        assert gradient.any() == exact[name].any(), name
        if moved:
            assert gradient.any() != (UNREACHED.get((method, kind), "-") in name), name
    ours, theirs = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, exact))
    assert torch.linalg.norm(ours - theirs) < 0.05 * torch.linalg.norm(theirs)


@short_sweep
def test_eval_is_deterministic(method, kind):
    model = make(kind, drop_rate=0.2, drop_path_rate=0.3)
    handle = attached(model, method)
    randomise(handle)
    model.train()
    model.eval()
    x = images(model)
    assert torch.equal(run(model, x), run(model, x))
    handle.train()
    assert not model.training, "a frozen backbone stays in eval mode"
    handle.train(backbone=True)
    assert model.training


@sweep
def test_merge_and_unmerge(method, kind):
    model = make(kind)
    handle = attached(model, method)
    randomise(handle, 0.05)
    x, values = images(model, 4), tensors(model)
    hooked = run(model, x)
    if not handle.mergeable:
        with pytest.raises(vpeft.MethodError, match="cannot be merged"):
            handle.merge()
        assert torch.equal(run(model, x), hooked)
        return
    handle.merge()
    merged = run(model, x)
    assert (merged - hooked).abs().max() <= 1e-5 * hooked.std()
    with pytest.raises(vpeft.MethodError, match="merged already"):
        handle.merge()
    with pytest.raises(vpeft.MethodError, match="merged"):
        handle.save("never.safetensors")
    with pytest.raises(vpeft.MethodError, match="merged"):
        handle.disable()
    handle.unmerge()
    assert torch.equal(run(model, x), hooked)
    assert all(torch.equal(v, values[n]) for n, v in tensors(model).items())
    with pytest.raises(vpeft.MethodError, match="not merged"):
        handle.unmerge()
    plain = handle.merge().detach(keep_merged=True)
    assert torch.equal(run(plain, x), merged)
    assert not hasattr(plain, "vpeft")


@short_sweep
def test_switching_off_gives_the_bare_model(method, kind):
    model = make(kind)
    x = images(model)
    bare = run(model, x)
    handle = attached(model, method)
    randomise(handle)
    adapted = run(model, x)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    with handle.disable():
        assert torch.equal(run(model, x), bare)
        assert all(torch.equal(t, state[n]) for n, t in handle.state_dict().items())
        with handle.enable():
            assert torch.equal(run(model, x), adapted)
        assert torch.equal(run(model, x), bare)
    assert torch.equal(run(model, x), adapted)


@pytest.mark.parametrize(("method", "kind"), SAMPLE)
def test_two_methods_coexist_and_save_separately(method, kind, tmp_path):
    model = make(kind)
    x = images(model)
    first = attached(model, method, name="first")
    randomise(first)
    alone = run(model, x)
    second = vpeft.attach(model, "adaptformer", name="second", bottleneck=4)
    assert not first.enabled
    assert not any(p.requires_grad for p in first.parameters() if id(p) not in {id(q) for q in second.parameters()})
    randomise(second)
    other = run(model, x)
    files = [h.save(tmp_path / f"{h.name}.safetensors") for h in (first, second)]
    assert torch.equal(run(model, x), other)
    for file, expected in zip(files, (alone, other), strict=True):
        fresh = make(kind)
        vpeft.load(fresh, file)
        assert torch.equal(run(fresh, x), expected)
    second.disable()
    first.enable()
    assert torch.equal(run(model, x), alone)
    second.detach()
    assert torch.equal(run(model, x), alone)
    with pytest.raises(vpeft.MethodError, match="attached already"):
        vpeft.attach(model, "adaptformer", name="first")


@on_vit
def test_an_empty_batch_has_an_empty_answer(method):
    """Attaching relies on it, so as not to compute an image (timm's Swin takes no empty batch)."""
    model = make("vit")
    x = images(model)[:0]
    expected = run(model, x).shape
    attached(model, method)
    assert run(model, x).shape == expected


@short_sweep
def test_timm_calls_still_work(method, kind):
    model = make(kind)
    randomise(attached(model, method))
    x = images(model)
    final, intermediates = model.forward_intermediates(x, indices=2)
    features = model.forward_features(x)
    assert torch.equal(final, features)
    assert all(i.ndim == 4 and torch.isfinite(i).all() for i in intermediates)
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(9)
    assert model(x).shape == (3, 9)


@pytest.mark.parametrize(("method", "kind"), SHORT_SWEEP)
def test_boundary_needs_no_gradient_below(method, kind):
    model = make(kind)
    handle = attached(model, method)
    boundary = handle.boundary
    assert boundary in ("patch_embed", "head") or model.get_submodule(boundary) is not None
    reached = {}
    model.patch_embed.register_forward_hook(lambda m, a, out: reached.update(x=out.requires_grad))
    model(images(model))
    if boundary != "patch_embed":
        assert not reached["x"]


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in THIRDS else pytest.mark.slow) for m in sorted(METHODS)])
def test_options_rebuild_the_method(method):
    made = create(method)
    assert create(method, **made.options()) == made
    for preset in type(made).presets:
        again = create(method, preset=preset)
        assert create(method, **again.options()) == again
    text = str(vpeft.describe(method))
    assert made.paper.title in text
    doc = made.__doc__.strip()
    assert len(doc) > 40
    assert not doc.startswith(f"{type(made).__name__}("), "a dataclass's own text is no documentation"


@pytest.mark.slow
@on_vit
def test_compiled_with_inductor(method):
    model = make("vit")
    handle = attached(model, method)
    randomise(handle, 0.05)
    handle.eval()
    x = images(model)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5, rtol=1e-5)


def test_models_here_are_what_they_claim():
    assert set(MODELS) == {"vit", "vit_reg", "swin"}
    model = make("vit_reg")
    assert model.num_prefix_tokens == 5
    scatter(model.named_parameters())
    assert isinstance(model.blocks[0].ls1, nn.Module)
    assert hasattr(model.blocks[0].ls1, "gamma")
