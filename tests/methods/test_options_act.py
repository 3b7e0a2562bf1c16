"""Options of methods that nothing else sets: what each changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import attached, images, make, randomise, train_steps

LABELS = torch.tensor([0, 1, 2, 3])


def copies(tensors):
    return {n: t.detach().clone() for n, t in tensors.items()}


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("method", ["adapter", "adapterbias"])
def test_train_norms_trains_every_norm_and_nothing_more(method, kind):
    for train_norms in (False, True):
        model = make(kind)
        norms = {
            f"{path}.{n}" for path, m in model.named_modules() if isinstance(m, nn.LayerNorm)
            for n, _ in m.named_parameters()
        }  # fmt: skip
        assert len(norms) > 8
        before = copies(model.state_dict())
        handle = attached(model, method, train_norms=train_norms)
        train_steps(model, handle)
        after = model.state_dict()
        moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
        saved = {n for n in handle.state_dict() if n in before}
        assert moved - set(handle.head_state_dict()) == (norms if train_norms else set())
        assert saved - set(handle.head_state_dict()) == (norms if train_norms else set())


def growing(**options):
    model = make("vit", dtype=torch.float64)
    handle = attached(model, "increlora", rank=3, targets=["q", "fc1"], **options)
    randomise(handle, 0.1)
    return model, handle


@pytest.mark.parametrize("beta2", [0.0, 0.25, 0.9])
def test_increlora_beta2_is_of_the_running_mean_of_deviations(beta2):
    model, handle = growing(beta1=0.5, beta2=beta2)
    scores = {n.removesuffix(".score"): p for n, p in handle.named_parameters() if n.endswith(".score")}
    mean, deviation = (dict.fromkeys(scores, 0.0) for _ in range(2))
    for step in range(2):
        for p in scores.values():
            p.grad = None
        F.cross_entropy(model(images(model, 4, seed=step)), LABELS).backward()
        handle.after_step()
        state = handle.state_dict()
        for n, p in scores.items():
            mean[n] = 0.5 * mean[n] + 0.5 * p.grad.item()
            deviation[n] = beta2 * deviation[n] + (1 - beta2) * abs(p.grad.item() - mean[n])
            assert mean[n] > 0
            assert state[f"{n}.sensitivity"].item() == pytest.approx(mean[n], rel=1e-10)
            assert state[f"{n}.uncertainty"].item() == pytest.approx(deviation[n], rel=1e-10)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7])
def test_increlora_orthogonality_weighs_the_penalty(weight):
    _, handle = growing(orthogonality=weight)
    state, distances = handle.state_dict(), []
    for name in (n.removesuffix(".e") for n in state if n.endswith(".e")):
        trained = int(state[f"{name}.rank"]) + handle.method.rows
        for rows in (state[f"{name}.a"][:trained], state[f"{name}.b"][:, :trained].T):
            distances.append(torch.linalg.norm(rows @ rows.T - torch.eye(trained)).item())
    penalty = handle.penalty()
    assert penalty.item() == pytest.approx(weight * sum(distances) / len(distances), rel=1e-10)
    penalty.backward()
    gradients = [p.grad.abs().max() for n, p in handle.named_parameters() if n.endswith(".a")]
    assert gradients
    assert all((g > 0) == (weight > 0) for g in gradients)
