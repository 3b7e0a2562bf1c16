"""The two files of an adapter of huggingface peft: what stands in them, and what of it cannot be had here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, did_you_mean, shown, some
from ...files import as_path, parse_json, read_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA, LOKR = "LORA", "LOKR"
# Endings of the tensors of one linear, and what they are called below.
ENDINGS = {
    LORA: {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"},
    LOKR: {f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
# Where the tensors are, their names say; where their weights came from and what trains them changes no output.
SAYS_NOTHING = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
# What changes the update, and is computed here.
COMPUTED = {
    LORA: {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout",
           "init_lora_weights"},
    LOKR: {"r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor", "init_weights",
           "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"},
}  # fmt: skip
# Values of ``init_lora_weights`` that leave the model's own weights as they are.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


LONGEST = 500  # characters of a pattern
_REPEAT = re.compile(r"[*+{]|(?<!\()\?")
_NESTED = re.compile(r"\)[*+{]")  # (a+)+ takes as long as two to the power of a name's length


@dataclass
class PeftAdapter:
    """An adapter as its files have it.

    Attributes:
        folder: of the files.
        kind: ``LORA`` or ``LOKR``.
        config: the values of ``adapter_config.json``.
        linears: for each adapted linear's path, its tensors by their short names.
        saved: tensors of modules that were trained whole, by their names in the model.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    linears: dict[str, dict[str, Tensor]]
    saved: dict[str, Tensor]

    def size(self, path: str) -> int:
        """r of one linear."""
        return self._of("rank_pattern", "r", path)

    def alpha(self, path: str) -> float:
        """alpha of one linear."""
        return self._of("alpha_pattern", "lora_alpha" if self.kind == LORA else "alpha", path)

    def scale(self, path: str) -> float:
        """What the update of one linear is multiplied by."""
        r = self.size(path)
        return self.alpha(path) / (r**0.5 if self.config.get("use_rslora") else r)

    def _of(self, patterns: str, key: str, path: str) -> Any:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.fullmatch(r"[\w.]+", pattern):  # a path, as nearly always
                found = path == pattern or path.endswith(f".{pattern}")
            else:
                found = bool(re.match(rf"(.*\.)?({pattern})$", path))  # as peft does
            if found:
                return value
        return self.config[key]


def read(folder: str | Path) -> PeftAdapter:
    """Read an adapter and refuse what its configuration says that has no like here.

    Raises:
        CheckpointError: missing or damaged files, pickles, another kind of adapter, or an option without a like; names it.
    """
    folder = as_path(folder)
    if not (folder / TENSORS).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        more = f"; {pickles[0]} is a pickle, which is not loaded: save it with safe_serialization=True" if pickles else ""
        raise CheckpointError(f"{folder} has no {TENSORS}{more}")
    config = _config(folder / CONFIG)
    kind = config["peft_type"]
    linears: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    strange = []
    for name, tensor in read_tensors(folder / TENSORS)[1].items():
        path, short = _place(name, kind)
        if short:
            linears.setdefault(path, {})[short] = tensor
        elif name.startswith(PREFIX) and not re.search(r"(^|\.)(lora|lokr)_|\.base_layer\.", name):
            saved[name.removeprefix(PREFIX)] = tensor
        else:
            strange.append(name)
    if strange:
        raise CheckpointError(f"{folder}: there is no like here for {some(sorted(strange))}")
    found = PeftAdapter(folder, kind, config, linears, saved)
    for path, tensors in linears.items():
        _check(found, path, tensors)
    if not linears:
        raise CheckpointError(f"{folder}: {TENSORS} adapts no linear")
    return found


def _place(name: str, kind: str) -> tuple[str, str | None]:
    for ending, short in ENDINGS[kind].items():
        if name.startswith(PREFIX) and name.endswith(f".{ending}"):
            return name[len(PREFIX) : -len(ending) - 1], short
    return name, None


def _config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    config = parse_json(text, file)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ENDINGS:
        raise CheckpointError(
            f"{file}: peft_type {shown(kind)} cannot be had here; LORA (with use_rslora, use_dora) and LOKR can"
        )
    neutral = (None, False, {}, [], "", 0)
    for key, value in config.items():
        if key in SAYS_NOTHING | COMPUTED[kind] or value in neutral:
            continue
        if key == "bias":
            if value != "none":
                raise CheckpointError(f"{file}: bias={value!r} trains biases beside the update, which has no like here")
            continue
        raise CheckpointError(f"{file}: {key}={shown(value)} has no like here{did_you_mean(key, COMPUTED[kind])}"[:500])
    _check_values(config, kind, file)
    return config


def _check_values(config: Mapping[str, Any], kind: str, file: Path) -> None:
    """Refuse numbers that are none, and starts that have changed the weights of the model."""
    keys = ("r", "lora_alpha") if kind == LORA else ("r", "alpha")
    for key in keys:
        _check_number(config.get(key), key, file, least=1 if key == "r" else 0)
    for patterns in ("rank_pattern", "alpha_pattern"):
        found = config.get(patterns) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{file}: {patterns} is no mapping but {shown(found)}")
        for pattern, value in found.items():
            _check_number(value, f"{patterns}['{pattern}']", file, least=1 if patterns[0] == "r" else 0)
            if len(pattern) > LONGEST:
                raise CheckpointError(
                    f"{file}: {patterns}: a pattern of {len(pattern)} characters, where at most {LONGEST} are taken: "
                    f"{shown(pattern[:40])}…"
                )
            if _NESTED.search(pattern) or len(_REPEAT.findall(pattern)) > 3 or pattern.count("(") > 4:
                raise CheckpointError(
                    f"{file}: {patterns}: {shown(pattern)} repeats a group, or has more than 3 repetitions or 4 groups, "
                    "which can take for ever; write it with fewer, or as paths"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{file}: {patterns}: {shown(pattern)} is no pattern: {error}") from error
    start = config.get("init_lora_weights", True)
    if kind == LORA and start not in STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights={shown(start)} changes the frozen weights too, which are not in the file; save it "
            "as a plain LoRA (peft: save_pretrained(…, path_initial_model_for_weight_conversion=…))"
        )
    dropout = config.get("lora_dropout") or 0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(f"{file}: lora_dropout: {shown(dropout)} is no probability")


def _check_number(value: Any, key: str, file: Path, least: float) -> None:
    whole = least == 1
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not least <= value < 1e9:
        raise CheckpointError(f"{file}: {key}: {shown(value)} is no {'whole ' if whole else ''}number of at least {least}")


def _check(adapter: PeftAdapter, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not together what an update needs."""
    names = tensors.keys()
    if adapter.kind == LORA:
        fits = names == ({"a", "b", "m"} if adapter.config.get("use_dora") else {"a", "b"})
        fits = fits and tensors["a"].ndim == tensors["b"].ndim == 2 and tensors["a"].shape[0] == tensors["b"].shape[1]
        fits = fits and tensors["a"].shape[0] == adapter.size(path)
    else:
        sides = [{n for n in names if n.startswith(side)} for side in ("w1", "w2")]
        fits = all(side in ({w}, {f"{w}_a", f"{w}_b"}) for side, w in zip(sides, ("w1", "w2"), strict=True))
        fits = fits and all(t.ndim == 2 for t in tensors.values())
    if not fits or any(not t.is_floating_point() for t in tensors.values()):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(tensors.items()))
        size = adapter.size(path)
        raise CheckpointError(f"{adapter.folder}: {path} has {shapes}, which are no update of a linear with r={size}")
