"""DDP and FSDP2 in two processes on a CPU: train, save, load, switch, merge, resume; what is refused.

What the processes do is in ``worker.py``. The sweep over all methods: ``python -m pytest -m slow -s tests/distributed``.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import CASES
from tests.support.places import ENVIRONMENT, ROOT

MAIN = ("lora", "bitfit", "dtl")  # all: in the slow sweep
FAST = [
    *(f"train_save_load:blocks:{method}:vit" for method in MAIN),
    "train_save_load:ddp:lora:vit", "train_save_load:ddp:bitfit:vit", "train_save_load:small:vqt:vit",
    "around:blocks:attention:vit", "every_epoch:blocks:ilm_vp:vit", "drawn_apart:ddp:adapterdrop:vit",
    "drawn_together:blocks:supernet:vit", "drawn_apart:blocks:adamix:vit", "resume:blocks:bitfit:vit", "growth:blocks:increlora:vit",
    "refusals:blocks:child_tuning_d:vit", "no_unit:-:lora:vit", "unlike:blocks:lora_fa:vit",
    "cannot_write:blocks:lora:vit", "one_unit_for_all_blocks:-:vqt:vit", "fsdp1:-:lora:vit", "engine:-:-:-",
]  # fmt: skip
# What a method cannot do in a setting; empty: everything works.
REFUSED: set[str] = set()
SETTINGS = ("ddp", "blocks", "accelerate")
SWEEP = [f"{f}:{s}:{m}:{k}" for s in SETTINGS for m, k in CASES if k != "vit_reg" for f in ("train_save_load", "resume")]

MORE = [
    "drawn_together:ddp:supernet:vit",
    "resume:accelerate:vqt:vit",
    "train_save_load:root:vqt:vit",
    "around:small:lora:vit",
    "drawn_apart:blocks:adapterdrop:vit",
]


def run_pair(folder: Path, cases: list[str], timeout: float) -> dict[str, str]:
    """What two processes found, by case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.worker", str(folder / "results.json"), *cases]
    pair = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=file)
        for rank in range(2)
        for file in [(folder / f"errors{rank}").open("w")]
    ]
    try:
        codes = [process.wait(timeout) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert codes == [0, 0], (folder / "errors0").read_text()[-3000:] + (folder / "errors1").read_text()[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    return run_pair(tmp_path_factory.mktemp("two"), FAST, 300)


@pytest.mark.parametrize("case", FAST)
def test_two_processes(found, case):
    assert found[case] == "ok"


@pytest.mark.slow
def test_more_in_two_processes(tmp_path):
    assert run_pair(tmp_path, MORE, 300) == dict.fromkeys(MORE, "ok")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_every_method(tmp_path, setting, kind):
    cases = [case for case in SWEEP if case.split(":")[1] == setting and case.endswith(f":{kind}")]
    if setting == "accelerate" and kind == "swin":
        cases = [case for case in cases if case.startswith("resume")]
    found = run_pair(tmp_path, cases, 3600)
    print("", *(f"{case:45} {result}" for case, result in found.items()), sep="\n")
    assert {case: result for case, result in found.items() if result != "ok" and case not in REFUSED} == {}
    assert len(found) == len(cases) > 50
