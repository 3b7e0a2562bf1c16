"""Files of the Hugging Face Hub, through huggingface_hub alone: its cache, its offline mode, its tokens."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError
from .places import is_inside, offline

SCHEME = "hf://"
_REPO = re.compile(r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(?:/(?P<file>[^@\s]+?))?(?:@(?P<revision>[^@\s]+))?")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A file of a repository, or a whole one.

    Attributes:
        repo: ``user/name``.
        file: path inside it; None for the whole.
        revision: a branch, tag or commit; None for the main branch.
    """

    repo: str
    file: str | None
    revision: str | None

    @classmethod
    def of(cls, text: str) -> "Place":
        """Of ``hf://user/repo/file@revision``.

        Raises:
            DownloadError: it is written otherwise.
        """
        found = _REPO.fullmatch(text)
        names = found and is_inside(found["repo"]) and (found["file"] is None or is_inside(found["file"]))
        if not names:
            raise DownloadError(f"{text[:200]!r} is not hf://user/repo/file@revision (@revision may be left out)")
        return cls(found["repo"], found["file"], found["revision"])

    def beside(self, file: str) -> "Place":
        """Another file of the same revision."""
        return Place(self.repo, file, self.revision)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}{f'/{self.file}' if self.file else ''}{f'@{self.revision}' if self.revision else ''}"


def endpoint() -> str | None:
    """``HF_ENDPOINT`` as it is now: huggingface_hub looks when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def fetch(place: Place) -> Path:
    """A file of the Hub in huggingface_hub's cache.

    Raises:
        DownloadError: it cannot be had; names it, and what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    home = os.environ.get("HF_HUB_CACHE") or (
        os.path.join(os.environ["HF_HOME"], "hub") if os.environ.get("HF_HOME") else None
    )
    try:
        return Path(
            hf_hub_download(
                place.repo, place.file, revision=place.revision, endpoint=endpoint(), local_files_only=offline(),
                cache_dir=home, library_name="vpeft",
            )
        )  # fmt: skip
    except LocalEntryNotFoundError:
        why = "the network is off (HF_HUB_OFFLINE, VPEFT_OFFLINE)" if offline() else "the Hub cannot be reached"
        raise DownloadError(f"{place} is not in huggingface_hub's cache, and {why}") from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DownloadError(f"{place}: {why_not(error, place)}") from None


def why_not(error: Exception, place: Place) -> str:
    """What the Hub's error means, in one line."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{place.repo} asks its users to accept its terms, on its page"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no '{place.repo}', or it is private and no token was given (HF_TOKEN, or `hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return f"'{place.repo}' has no revision '{place.revision}'"
    if isinstance(error, EntryNotFoundError):
        return f"'{place.repo}' has no file '{place.file}' at {place.revision or 'its main branch'}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the token does not allow that ({status}); HF_TOKEN or `hf auth login` give another"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
