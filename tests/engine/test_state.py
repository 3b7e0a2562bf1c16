"""The state file of a run, also one that an earlier version wrote."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vpeft import CheckpointError
from vpeft.engine.state import Average, RunState, optimizer_state, optimizer_tensors


def optimizer_after(steps):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(12)]
    optimizer = torch.optim.AdamW(params)
    for _ in range(steps):
        for p in params[:11]:  # the last one has no state
            p.grad = torch.randn(3)
        optimizer.step()
    return optimizer


def test_a_state_comes_back(tmp_path):
    optimizer = optimizer_after(2)
    state = optimizer.state_dict()["state"]
    state[0]["plain"] = 5
    average = [torch.randn(2) for _ in range(12)]
    written = RunState({"blocks.0.a": torch.randn(2)}, average, state, 3, {"epoch": 2, "value": 0.5}, {"scale": 8.0})
    written.write(tmp_path / "state.safetensors")
    found = RunState.read(tmp_path / "state.safetensors")
    assert (found.epoch, found.best, found.scaler) == (3, {"epoch": 2, "value": 0.5}, {"scale": 8.0})
    assert torch.equal(found.trained["blocks.0.a"], written.trained["blocks.0.a"])
    assert all(torch.equal(a, b) for a, b in zip(found.average, average, strict=True))
    assert found.optimizer.keys() == state.keys()
    for index, entries in state.items():
        assert found.optimizer[index].keys() == entries.keys()
        assert all(torch.equal(torch.as_tensor(found.optimizer[index][k]), torch.as_tensor(v)) for k, v in entries.items())


def test_the_layout_is_that_of_earlier_files(tmp_path):
    tensors = {"method/a.b": torch.ones(2), "average/0": torch.zeros(2), "optimizer/3/exp_avg": torch.full((2,), 4.0)}
    about = {"epoch": 1, "best": {"epoch": 0, "value": 1.5}, "scalars": {"3": {"step": 7}}}
    save_file(tensors, tmp_path / "state.safetensors", {"state": json.dumps(about)})
    found = RunState.read(tmp_path / "state.safetensors")
    assert found.trained.keys() == {"a.b"}
    assert torch.equal(found.average[0], torch.zeros(2))
    assert found.optimizer[3].keys() == {"exp_avg", "step"}
    assert found.optimizer[3]["step"] == 7
    assert found.scaler is None
    found.write(tmp_path / "again.safetensors")
    assert RunState.read(tmp_path / "again.safetensors").optimizer[3]["step"] == 7


def test_an_optimiser_goes_on_from_the_tensors():
    whole, half = optimizer_after(2), optimizer_after(2)
    tensors, scalars = optimizer_tensors(half.state_dict()["state"])
    fresh = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in half.param_groups[0]["params"]])
    state = optimizer_state(tensors | {"model/x": torch.ones(1)}, json.loads(json.dumps(scalars)))
    fresh.load_state_dict({"state": state, "param_groups": fresh.state_dict()["param_groups"]})
    for optimizer in (whole, fresh):
        torch.manual_seed(1)
        for p in optimizer.param_groups[0]["params"][:11]:
            p.grad = torch.randn(3)
        optimizer.step()
    pairs = zip(whole.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_average_swaps_and_goes_on():
    p = torch.nn.Parameter(torch.zeros(2))
    average = Average([p], 0.75)
    with torch.no_grad():
        p.fill_(4.0)
    average.update()
    assert torch.equal(average.values[0], torch.ones(2))
    average.swap()
    assert torch.equal(p, torch.ones(2))
    average.swap()
    average.load([torch.full((2,), 3.0)])
    assert torch.equal(average.values[0], torch.full((2,), 3.0))
    assert torch.equal(p, torch.full((2,), 4.0))


@pytest.mark.parametrize(
    "text",
    [
        None, "", "[]", "{", "null", '{"epoch": 1, "best": {}}', '{"epoch": "x", "best": {}, "scalars": {}}',
        '{"epoch": -1, "best": {}, "scalars": {}}', '{"epoch": 1, "best": [], "scalars": {}}', "[" * 5000,
        '{"epoch": 1, "best": {}, "scalars": {"x": {}}}', '{"epoch": 1, "best": {}, "scalars": {"3": 4}}',
    ],
)  # fmt: skip
def test_a_state_of_another_kind_is_refused_by_name(tmp_path, text):
    file = tmp_path / "state.safetensors"
    save_file({"method/a": torch.ones(2)}, file, None if text is None else {"state": text})
    with pytest.raises(CheckpointError, match=r"state of a run|metadata") as raised:
        RunState.read(file)
    assert str(file) in str(raised.value)
    good = json.dumps({"epoch": 1, "best": {}, "scalars": {}})
    save_file({"optimizer/x/exp_avg": torch.ones(2)}, file, {"state": good})
    with pytest.raises(CheckpointError, match="state of a run"):
        RunState.read(file)
