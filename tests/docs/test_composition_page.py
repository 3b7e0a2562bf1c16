"""The code of docs/composition.md runs as it stands."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_the_code_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/composition.md").read_text(), re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 5
    assert names["logits"].shape == (4, 10)
    assert names["both"].method.rank == 8
    assert torch.isfinite(names["fresh"](names["images"])).all()
