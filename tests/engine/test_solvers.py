"""Solvers of the head: logistic regression beside scikit-learn's, nearest neighbours, their runs, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import vpeft
from vpeft.engine.cache import FeatureCache
from vpeft.engine.config import load_config
from vpeft.engine.solvers.choosing import chosen_on, parts
from vpeft.engine.solvers.logistic import solutions
from vpeft.engine.solvers.neighbours import compared
from vpeft.engine.test import test as evaluate
from vpeft.engine.train import train
from vpeft.suites.table import table

PROBE = ("method.name=linear", "method.options={}", "data.val_size=0", "data.num_samples=200")
LBFGS = (*PROBE, "train.solver=lbfgs", "solve.l2=[0.1,0.01]")
KNN = (*PROBE, "train.solver=knn", "solve.neighbours=[1,5]", "solve.temperature=[0.05,1.0]")


def samples(classes: int = 4, count: int = 90, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 30, 0.01, 2, 5, 1], dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (centres[labels] + 1.5 * noise) * scale + 3, labels


def folder(config) -> Path:
    return Path(config.output, config.name)


# ---- the mathematics ----


def test_a_solution_is_that_of_scikit_learn():
    x, y = samples()
    scaled = StandardScaler().fit_transform(x)
    found = list(solutions(x, y, 4, [0.001, 0.1, 0.01]))
    assert [s.l2 for s in found] == [0.1, 0.01, 0.001]
    for solution in found:
        peer = LogisticRegression(C=1 / (solution.l2 * len(y)), tol=1e-9, max_iter=10_000).fit(scaled, y)
        assert torch.allclose(solution.scores(x).softmax(1), torch.from_numpy(peer.predict_proba(scaled)), atol=1e-4)
        assert solution.gradient < 1e-5


def test_two_classes_are_as_many_rows_as_any():
    x, y = samples(classes=2)
    (solution,) = solutions(x, y, 2, [0.03])
    # Two rows share what one has alone in scikit-learn: half the penalty.
    peer, scaled = LogisticRegression(C=2 / (0.03 * len(y)), tol=1e-9, max_iter=10_000), StandardScaler().fit_transform(x)
    theirs = torch.from_numpy(peer.fit(scaled, y).predict_proba(scaled))
    assert torch.allclose(solution.scores(x).softmax(1), theirs, atol=1e-4)


def test_a_class_without_samples_is_never_the_answer_and_a_constant_feature_is_harmless():
    x, y = samples()
    x = torch.cat([x, torch.full((len(x), 1), 1e4, dtype=x.dtype)], 1)
    (six,) = solutions(x, y, 6, [0.01])
    (four,) = solutions(x[:, :-1], y, 4, [0.01])
    shares = six.scores(x).softmax(1)
    assert shares[:, 4:].max() < 1e-4
    assert torch.allclose(shares[:, :4], four.scores(x[:, :-1]).softmax(1), atol=1e-4)


def test_what_is_constant_but_for_rounding_is_no_feature():
    """Else the rounding of float32 gets weights of 1e5, and the head answers otherwise in another batch size."""
    x, y = samples(count=200)
    rounding = 5 + torch.randint(-1, 2, (200, 1), generator=torch.Generator().manual_seed(1)) * 2.0**-21
    (solution,) = solutions(torch.cat([x, rounding.double()], 1), y, 4, [1e-5])
    (plain,) = solutions(x, y, 4, [1e-5])
    assert solution.weight[:, -1].abs().max() < 1
    assert torch.allclose(
        solution.scores(torch.cat([x, torch.full_like(rounding, 5).double()], 1)), plain.scores(x), atol=0.01
    )


def test_the_choice_is_that_of_the_held_out_samples():
    x, y = samples(count=200)
    kept, held = torch.arange(150), torch.arange(150, 200)
    found = chosen_on(x, y, [(kept, held)], 4, [1.0, 0.01])
    for solution in solutions(x[kept], y[kept], 4, [1.0, 0.01]):
        scores = solution.scores(x[held])
        loss, top1 = found[solution.l2]
        assert loss == pytest.approx(float(F.cross_entropy(scores, y[held])))
        assert top1 == pytest.approx(100 * float((scores.argmax(1) == y[held]).double().mean()))


def test_parts_hold_each_sample_out_once_and_few_shots_leave_out_what_cannot_be_learned():
    _, y = samples(count=83)
    pairs = list(parts(y, 5, seed=0))
    assert torch.cat([held for _, held in pairs]).sort().values.equal(torch.arange(83))
    assert all(set(kept.tolist()).isdisjoint(held.tolist()) for kept, held in pairs)
    assert all(y[held].bincount().min() >= 3 for _, held in pairs)
    again = list(parts(y, 5, seed=0))
    assert all(torch.equal(a, b) for one, two in zip(pairs, again, strict=True) for a, b in zip(one, two, strict=True))
    x, y = samples(count=9)  # three, two, two, two samples
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    y[-1] = 2  # one sample of the last class: it is held out of a part that does not know it
    found = chosen_on(x, y, list(parts(y, 5, seed=0)), 4, [0.1])
    assert found[0.1][0] < 20, "a class that no part can learn was counted"
    with pytest.raises(vpeft.DataError, match="every class has one training sample"):
        next(parts(torch.arange(4), 5, seed=0))


def test_neighbours_are_those_of_scikit_learn():
    x, y = samples(count=120)
    x = F.normalize(x, dim=1)
    bank, held = x[:90], (x[90:], y[90:])
    found = compared(bank, y[:90], held, 4, [1, 7], [0.05, 1e3])
    for (k, temperature), (top1, _) in found.items():
        weights = lambda d, t=temperature: np.exp(-d / t)  # noqa: E731
        peer = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(bank, y[:90])
        assert top1 == pytest.approx(100 * peer.score(*held))


def test_left_out_one_by_one_no_sample_is_its_own_neighbour():
    x, y = samples(count=60)
    x = F.normalize(x, dim=1)
    found = compared(x, y, None, 4, [3, 1000], [0.1])
    assert set(found) == {(3, 0.1), (59, 0.1)}
    hits = 0
    for i in range(60):
        others = [j for j in range(60) if j != i]
        one = compared(x[others], y[others], (x[i : i + 1], y[i : i + 1]), 4, [3], [0.1])
        hits += one[3, 0.1][0] == 100
    assert found[3, 0.1][0] == pytest.approx(100 * hits / 60)


# ---- runs ----


@pytest.mark.slow
def test_a_solved_head_is_an_ordinary_checkpoint(tiny):
    config = tiny(*LBFGS)
    metrics = train(config)
    path = folder(config)
    about = metrics["solver"]
    assert (about["name"], set(about["grid"])) == ("lbfgs", {"0.1", "0.01"})
    assert about["l2"] == float(min(about["grid"], key=lambda k: about["grid"][k]["loss"]))
    assert about["gradient"] < 1e-5
    assert json.loads((path / "metrics.json").read_text()) == metrics
    assert [r["epoch"] for r in map(json.loads, (path / "log.jsonl").read_text().splitlines())] == [0]
    assert "5 of 5 parts" in (path / "console.log").read_text()
    best = {n: t.clone() for n, t in load_file(path / "best.safetensors").items()}  # the file is cut below
    assert sum(t.numel() for t in best.values()) == metrics["trainable"] == 170
    assert evaluate(tiny(*LBFGS), path / "best.safetensors")["top1"] == pytest.approx(metrics["test_top1"])
    # Killed between its state and its end, it ends as it would have; twice gives the same.
    (path / "metrics.json").unlink()
    (path / "best.safetensors").write_bytes(b"cut")
    assert train(tiny(*LBFGS))["solver"] == about
    assert all(torch.equal(t, best[n]) for n, t in load_file(path / "best.safetensors").items())
    with pytest.raises(vpeft.ConfigError, match="finished run"):
        train(tiny(*LBFGS))


def test_with_a_validation_split_the_others_alone_are_learned(tiny, monkeypatch):
    seen = []
    fill = FeatureCache.fill
    monkeypatch.setattr(FeatureCache, "fill", lambda self, *a, **k: seen.append(fill(self, *a, **k)) or seen[-1])
    config = tiny(*LBFGS, "data.val_size=60", "train.precision=bf16")
    metrics = train(config)
    assert metrics["solver"]["chosen_by"] == "the validation split"
    cache, held = seen
    assert (len(cache.labels), len(held.labels)) == (140, 60)
    (features,), (validation,) = cache.features.values(), held.features.values()
    *_, solution = solutions(features.double(), cache.labels, 10, [metrics["solver"]["l2"]])
    head = load_file(folder(config) / "best.safetensors")
    assert torch.allclose(head["head.weight"], solution.weight.float(), atol=1e-3)
    hits = (solution.scores(validation.double()).argmax(1) == held.labels).float().mean()
    assert metrics["val_top1"] == pytest.approx(100 * float(hits), abs=4)  # the head works in bf16


def test_one_value_is_not_compared(tiny):
    metrics = train(tiny(*LBFGS, "solve.l2=[0.02]", "data.num_samples=10"))
    assert (metrics["solver"]["l2"], metrics["solver"]["chosen_by"]) == (0.02, "one value")


@pytest.mark.slow
def test_nearest_neighbours_have_metrics_and_no_checkpoint(tiny, tmp_path):
    config = tiny(*KNN)
    metrics = train(config)
    path = folder(config)
    assert metrics["trainable"] == 0
    assert not [*path.glob("best*"), *path.glob("last*")]
    assert "there is no checkpoint" in (path / "console.log").read_text()
    assert {metrics["solver"]["neighbours"]} <= {1, 5}
    assert metrics["test_top1"] > 40, "of a random backbone, and guessing has 10"
    (path / "metrics.json").unlink()
    assert train(tiny(*KNN))["test_top1"] == metrics["test_top1"]
    other = train(tiny(*KNN, "overwrite=true", "solve.neighbours=[1]"))
    assert other["solver"]["neighbours"] == 1
    assert json.loads((path / "metrics.json").read_text()) == other


def test_nearest_neighbours_are_a_row_of_a_table(tiny_file, tmp_path):
    out = tmp_path / "table"
    (row,) = table([tiny_file], KNN, seeds=(0,), out=out)
    assert (row["parameters"], row["with_head"], row["merge_error"]) == (0, 0, None)
    assert row["scores"][0] > 40
    assert out.with_suffix(".png").stat().st_size > 1000


# ---- what is refused, before anything is made ----

REFUSED = {
    "trains more than the head; choose method.name=linear": ["method.name=lora"],
    "augment.enabled=false, or train.solver=optim": ["augment.enabled=true"],
    "choose model.drop_path=0": ["model.drop_path=0.1"],
    "train.label_smoothing: acts on steps of an optimiser": ["train.label_smoothing=0.1"],
    "train.ema: acts on steps": ["train.ema=0.9"],
    "train.patience: acts on steps": ["train.patience=2", "data.val_size=100"],
    "solve.l2": ["solve.l2=[]"],
    r"solve.l2\[0\]: 0.0 is impossible": ["solve.l2=[0]"],
    "train.solver: 'lbgfs' is not one of optim, lbfgs, knn": ["train.solver=lbgfs"],
    r"head \(Linear\), head_dist \(Linear\)": ["model.name=deit_tiny_distilled_patch16_224"],
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("solver", ["lbfgs", pytest.param("knn", marks=pytest.mark.slow)])
def test_what_a_solver_cannot_do_is_refused(tiny, message, solver, tmp_path):
    with pytest.raises(vpeft.VpeftError, match=message):
        train(tiny(*PROBE, f"train.solver={solver}", *REFUSED[message]))
    assert not (tmp_path / "runs").exists()


def test_several_processes_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vpeft.ConfigError, match="works in one process"):
        train(tiny(*LBFGS))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("linear", 91.1), ("knn", 85.5)])
def test_the_shipped_baselines_reach_what_their_pages_say(name, least, tmp_path):
    assert train(load_config(f"configs/digits/{name}.yaml", [f"output={tmp_path}"]))["test_top1"] >= least
