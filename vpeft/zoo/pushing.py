"""``vpeft push``: a checkpoint, its configuration and a model card go to the Hugging Face Hub, through huggingface_hub."""

import math
import tempfile
from pathlib import Path
from typing import Any

import yaml

from .. import checkpoint
from ..engine.plan import BEST
from ..errors import CheckpointError, ConfigError, DownloadError
from ..fetching import hub, is_source
from ..fetching.places import offline
from ..methods import METHODS
from .adding import LICENCE
from .sharing import DATA, for_others

FILE = "adapter.safetensors"
# Words of the Hub for tasks and metrics; others are left as they are.
TASKS = {"classification": "image-classification", "segmentation": "image-segmentation", "video": "video-classification"}
METRICS = {"top1": "accuracy", "miou": "mean_iou"}
TEXT = """
# {title}

{method}, trained with [vpeft](https://pypi.org/project/vpeft) on `{backbone}` (timm){data}. {paper}

{use}

The file is safetensors: {size:.0f} kB, {tensors} tensors,
the method's options, the preprocessing, and the fingerprint of the frozen backbone, which `load` compares.

{metrics}
Options of the method: {options}. Classes: {classes}.
"""

# How it is used on files, whatever the task; and, where the timm model as it is made by its name is all there is, in code.
ON_FILES = """```bash
vpeft predict --ckpt hf://{repo}/{file}{at} FILE…
```"""
IN_CODE = """

```python
import timm, vpeft

model = timm.create_model("{backbone}", pretrained=True)
handle = vpeft.load(model, "hf://{repo}/{file}{at}")
```"""


def push(
    source: str | Path, repo: str, *, private: bool = False, revision: str | None = None, licence: str = LICENCE
) -> str:
    """Upload a checkpoint as ``adapter.safetensors``, with ``config.yaml`` and a model card, in one commit.

    Args:
        source: a run's folder, or what ``vpeft.load`` takes.
        repo: ``user/name``; it is made where it is not there.
        private: only its owner sees it; a public one that is there is refused.
        revision: a branch, made where it is not there; the main one where None.
        licence: in the card.

    Returns:
        Where it is, as ``vpeft.load`` takes it: ``hf://user/name/adapter.safetensors``.

    Raises:
        CheckpointError: nothing that others could use.
        ConfigError: no token, no network, or a name that is none.
        DownloadError: what the Hub refuses.
    """
    place = _place(repo, revision)
    file = checkpoint.read(_file_of(source))
    blob, config, _ = for_others(file, may=(*DATA, "data.fashion_mnist", "init", "video.lists"))
    _check_token()
    card = card_of(file, blob, place, licence)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / FILE).write_bytes(blob)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if config:
            (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        _upload(folder, place, private)
    return str(place)


def _upload(folder: Path, place: hub.Place, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=hub.endpoint(), library_name="vpeft")
    try:
        api.create_repo(place.repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(place.repo).private:
            raise ConfigError(f"--private: {place.repo} is there already and public; nothing was uploaded")
        if place.revision is not None:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        message = f"Upload {FILE} with vpeft"
        api.upload_folder(repo_id=place.repo, folder_path=folder, revision=place.revision, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:  # of each way to upload
        raise DownloadError(f"{place.repo}: {hub.why_not(error, place)}") from None


def _place(repo: str, revision: str | None) -> hub.Place:
    try:
        place = hub.Place.of(f"{hub.SCHEME}{repo}/{FILE}{f'@{revision}' if revision else ''}")
    except DownloadError:
        place = None
    if place is None or place.repo != repo:
        raise ConfigError(f"--repo: {repo[:100]!r} is no user/name, or --revision: {revision!r} no branch")
    return place


def _file_of(source: str | Path) -> str | Path:
    if is_source(source) or not Path(source).is_dir():
        return source
    if not (Path(source) / BEST).is_file():
        raise CheckpointError(f"{source} is no folder of a run: it has no {BEST}")
    return Path(source) / BEST


def _check_token() -> None:
    """Refuse before anything is sent."""
    from huggingface_hub import get_token

    if offline():
        raise ConfigError("the network is off (HF_HUB_OFFLINE, VPEFT_OFFLINE); nothing can be uploaded")
    if not get_token():
        raise ConfigError("no token of the Hugging Face Hub: set HF_TOKEN, or run `hf auth login`")


def card_of(file: checkpoint.File, blob: bytes, place: hub.Place, licence: str = LICENCE) -> str:
    """The model card of a checkpoint: metadata that the Hub reads, metrics among them, and a text for people.

    Args:
        file: the checkpoint.
        blob: what is uploaded of it.
        place: where to.
        licence: in the metadata.
    """
    from huggingface_hub import ModelCard, ModelCardData

    said, config = file.metadata, file.metadata["config"] or {}
    method, backbone = said["method"]["name"], said["model"]["name"] or said["model"]["class"]
    task = config.get("task")
    paper = METHODS[method].paper if method in METHODS else None
    name = place.repo.partition("/")[2]
    data = ModelCardData(
        license=licence.lower(), library_name="vpeft", model_name=name,
        tags=["vpeft", "timm", "parameter-efficient-fine-tuning", method, backbone],
        pipeline_tag=TASKS.get(task), eval_results=_results(file, task),
    )  # fmt: skip
    values = "\n".join(f"| {k} | {v:g} |" for k, v in _numbers(said["metrics"]).items())
    at = f"@{place.revision}" if place.revision else ""
    use = (ON_FILES + (IN_CODE if _is_plain_model(config, said) else "")).format(
        repo=place.repo, file=FILE, at=at, backbone=backbone
    )
    text = TEXT.format(
        title=name, method=method, backbone=backbone, use=use, size=len(blob) / 1000, tensors=len(file.shapes),
        data=f", on {_dataset(config)}" if config else "",
        paper=f"{paper.title}, {paper.venue}." if paper else "",
        metrics=f"| metric | value |\n|---|---:|\n{values}\n" if values else "",
        options=", ".join(f"{k}={v!r}" for k, v in said["method"]["options"].items()) or "none",
        classes=", ".join(map(str, said["class_names"] or [])) or "not named",
    )  # fmt: skip
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
    return str(card)


def _is_plain_model(config: dict[str, Any], said: dict[str, Any]) -> bool:
    """Whether timm's factory gives the whole model by its name alone."""
    model = config.get("model") or {}
    return (
        bool(said["model"]["name"])
        and config.get("task", "classification") == "classification"
        and not (model.get("img_size") or model.get("kwargs") or model.get("checkpoint"))
    )


def _dataset(config: dict[str, Any]) -> str:
    return str(config.get("data", {}).get("source", "unknown"))


def _results(file: checkpoint.File, task: str | None) -> list[Any] | None:
    from huggingface_hub import EvalResult

    name = _dataset(file.metadata["config"] or {})
    found = []
    for key, value in _numbers(file.metadata["metrics"]).items():
        split, _, metric = key.partition("_")
        if split in ("test", "val"):
            found.append(
                EvalResult(
                    task_type=TASKS.get(task, task or "other"), dataset_type=name, dataset_name=name, dataset_split=split,
                    metric_type=METRICS.get(metric, metric), metric_name=key, metric_value=value,
                )
            )  # fmt: skip
    return found or None


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}
