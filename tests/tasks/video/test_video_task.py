"""The loss and the judgement of clips."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vpeft
from tests.support.models import make
from vpeft.tasks.step import training_loss
from vpeft.tasks.video.step import ClipStep, view_mean

CPU = torch.device("cpu")


class Reader(nn.Module):
    """Reads its logits from the first pixels of a clip ``(B, 3, T, H, W)``."""

    def forward(self, clips):
        assert clips.ndim == 5
        assert clips.shape[1] == 3
        return clips[:, 0, 0, 0, :3]


def clips_with(logits: torch.Tensor) -> torch.Tensor:
    """``(…, 3)`` logits into clips ``(…, 3, 2, 4, 4)``."""
    clips = torch.zeros(*logits.shape[:-1], 3, 2, 4, 4)
    clips[..., 0, 0, 0, :3] = logits
    return clips


def test_views_are_averaged_after_the_softmax():
    # View 1 is all but sure of class 0; views 2 and 3 lean to class 1. The mean of logits says 0, that of softmax 1.
    logits = torch.tensor([[[20.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0]]])
    assert logits.mean(1).argmax() == 0
    probabilities = view_mean(Reader(), clips_with(logits), CPU)
    assert torch.allclose(probabilities, logits.exp().div(logits.exp().sum(-1, keepdim=True)).mean(1))
    task = ClipStep(3)
    values = task.evaluate(Reader(), [(clips_with(logits), torch.tensor([1]))], CPU)
    assert values["top1"] == 100
    assert values["loss"] == pytest.approx(-float(probabilities[0, 1].log()), rel=1e-5)


def test_flat_clips_count_as_one_view_and_batches_as_their_size():
    logits = torch.randn(5, 3)
    labels = torch.tensor([0, 1, 2, 1, 0])
    clips = clips_with(logits)
    task = ClipStep(3)
    values = task.evaluate(Reader(), [(clips[:4], labels[:4]), (clips[4:, None], labels[4:]), (clips[:0], labels[:0])], CPU)
    assert values["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert values["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert values["top5"] == 100, "three classes"


def test_loss_is_cross_entropy_with_smoothing():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    soft = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    expected = -(soft * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    assert training_loss(ClipStep(3, 0.1), Reader(), clips_with(logits), labels) == pytest.approx(float(expected), rel=1e-5)


def test_cutmix_cuts_the_same_window_from_all_frames():
    seen = []

    class Spy(nn.Module):
        def forward(self, clips):
            seen.append(clips.detach().clone())
            return torch.zeros(len(clips), 3)

    clips = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1).expand(2, 3, 5, 16, 16).clone()
    np.random.seed(0)
    for _ in range(10):
        training_loss(ClipStep(3, cutmix=1.0), Spy(), clips.clone(), torch.tensor([0, 1]))
    for mixed in seen:
        assert mixed.shape == (2, 3, 5, 16, 16)
        assert (mixed == mixed[:, :1, :1]).all(), "every channel and frame alike"
    assert any(set(mixed[0].unique().tolist()) == {1.0, 2.0} for mixed in seen), "a window of the other clip"


def test_a_method_that_compares_runs_gets_a_second_one_and_its_term_is_added():
    """AdaMix on a model that draws in each run: the divergence of the very logits that the two runs gave."""
    runs, labels = [], torch.tensor([0, 2])

    class Drawing(Reader):
        def forward(self, clips):
            runs.append(super().forward(clips) + torch.randn(2, 3))
            return runs[-1]

    handle = vpeft.attach(make("vit"), "adamix", consistency=3.0)
    torch.manual_seed(0)
    loss = training_loss(ClipStep(3), Drawing(), clips_with(torch.randn(2, 3)), labels, handle)
    assert len(runs) == 2
    p, q = (r.softmax(1) for r in runs)
    divergence = 0.5 * ((p - q) * (p / q).log()).sum(1).mean()
    assert float(loss) == pytest.approx(float(F.cross_entropy(runs[0], labels) + 3 * divergence), rel=1e-5)

    once = vpeft.attach(make("vit"), "adamix", consistency=0.0)
    training_loss(ClipStep(3), Drawing(), clips_with(torch.randn(2, 3)), labels, once)
    assert len(runs) == 3


def test_a_methods_penalty_is_added(monkeypatch):
    handle = vpeft.attach(make("vit"), "lora")
    monkeypatch.setattr(type(handle.method), "penalty", lambda self, handle: torch.tensor(7.0))
    logits, labels = torch.randn(2, 3), torch.tensor([0, 2])
    plain = training_loss(ClipStep(3), Reader(), clips_with(logits), labels)
    assert training_loss(ClipStep(3), Reader(), clips_with(logits), labels, handle) == pytest.approx(float(plain) + 7)
