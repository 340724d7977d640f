"""A data set of the Hugging Face hub: its files are downloaded as they are, into the hub's cache, and read in place.

    "hiyouga/geometry3k" ──list files──▶ commit, README.md ──repository.choose──▶ files ──download──▶ readers

All files are of the commit that was listed. The run's summary.json names it, a resumed run reads it again
(`same_commits`), and `task.revision=<commit>` repeats the run.
The files are asked for by branch, because the hub's cache then knows the branch when HF_HUB_OFFLINE is set.

`datasets` itself is used for repositories without files of rows (folders of
images, tar files); nothing of a repository is executed.

Respected: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, and the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl.errors import ConfigError, UserFault, fenced
from vlmrl.tasks.dataset.sources.reader import Reader, suffix_of
from vlmrl.tasks.dataset.sources.repository import Chosen, choose, choose_name, may_hold_rows
from vlmrl.tasks.dataset.videos import FILE_ENDINGS

LISTING_TIMEOUT_S = 15.0
"""How long the hub may take to list the files of a data set."""

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_SHARD = re.compile(r"(.*)(\d{5})-of-(\d{5})(.*)")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


_COMMITS: ContextVar[dict[str, str]] = ContextVar("commits")
"""Inside `same_commits`: id of a data set (and `@<revision>`) → its commit."""


@contextmanager
def same_commits(known: dict[str, str]) -> Iterator[None]:
    """Inside the block, a data set is of the commit that `known` names; those that it does not name are added."""
    token = _COMMITS.set(known)
    try:
        yield
    finally:
        _COMMITS.reset(token)


@dataclass(frozen=True)
class Snapshot:
    """The files of one split of a hub data set, on this machine."""

    folder: Path
    commit: str
    chosen: Chosen
    table: Reader | None = None
    """Rows that `datasets` has made, of a repository without files of rows."""


def is_hub_id(path: str) -> bool:
    """Whether a path can be the id of a data set: one or two names.

    >>> [is_hub_id(path) for path in ("hiyouga/geometry3k", "squad", "data/rows.parquet", "./squad", "a/b/c", "~/x")]
    [True, True, False, False, False, False]
    """
    return bool(_HUB_ID.fullmatch(path)) and not path.startswith(".") and suffix_of(path) is None


def download(repo: str, *, config: str | None, split: str | None, revision: str | None) -> Snapshot:
    """Download the files of a split, those that are not in the cache. Raises `ConfigError`."""
    from huggingface_hub import HfApi

    known = _COMMITS.get({})
    called = repo if revision is None else f"{repo}@{revision}"
    revision = known.get(called, revision)
    api = HfApi()  # of HF_ENDPOINT, with the user's token
    with _hub_errors(repo, revision):
        commit, files = _listing(repo, revision)
        known[called] = commit
        if not any(may_hold_rows(file) for file in files):
            return Snapshot(Path(), commit, Chosen((), "", ""), _built(repo, config, split, commit))
        readme = ""
        if "README.md" in files:
            place = api.hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision)
            readme = Path(place).read_text(encoding="utf-8", errors="replace")
        chosen = choose(files, readme, config=config, split=split, where=repo)
        wanted = [*chosen.files, *_media_of(chosen, files)]
        folder = api.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=[glob.escape(file) for file in wanted]
        )
    if Path(folder).name != commit:
        raise ConfigError(
            f"task.path={repo} was changed while it was downloaded, so its files are of two revisions: start again, or "
            f"set task.revision={commit}"
        )
    return Snapshot(Path(folder), commit, chosen)


def _built(repo: str, config: str | None, split: str | None, commit: str) -> Reader:
    """The rows that `datasets` makes of a repository: folders of images or videos, tar files. It executes no code of
    the repository. Raises `ConfigError`."""
    import datasets

    from vlmrl.tasks.dataset.sources.arrow_file import TableReader

    try:
        with fenced("datasets.load_dataset()"):
            built = datasets.load_dataset(repo, config, revision=commit)
            name = choose_name("task.split", "split", split, list(built), "train", repo)
            return TableReader(built[name].data.table)
    except UserFault as fault:
        reason = re.sub(r" \([^()]*:\d+, in [^()]*\)$", "", fault.text.splitlines()[0])
        raise ConfigError(
            f"task.path={repo} has no files of rows, and {reason}, so there are no rows (no script of a repository is "
            "executed): set task.revision=refs/convert/parquet, where the hub keeps Parquet copies of many data sets, "
            "or convert it to Parquet"
        ) from None


def _media_of(chosen: Chosen, files: list[str]) -> list[str]:
    """Images and videos to which rows of text refer by path: those below the folders of the data files."""
    if suffix_of(chosen.files[0]) in (".parquet", ".arrow"):
        return []
    folders = {file.rpartition("/")[0] for file in chosen.files}
    below = tuple(f"{folder}/" if folder else "" for folder in folders)
    return [file for file in files if file.lower().endswith((*_PICTURES, *FILE_ENDINGS)) and file.startswith(below)]


def _listing(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit of a revision and the paths of its files; of what the cache has, where HF_HUB_OFFLINE is set."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if not constants.is_offline_mode():
        info = HfApi().dataset_info(repo, revision=revision, timeout=LISTING_TIMEOUT_S)
        return str(info.sha), [file.rfilename for file in info.siblings or []]
    folder = Path(
        snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=[])
    )
    files = [place.relative_to(folder).as_posix() for place in folder.rglob("*") if place.is_file()]
    _check_shards(repo, files)
    return folder.name, files


def _check_shards(repo: str, files: list[str]) -> None:
    """Refuse a cache that lacks a shard of what it has: the run would train on less than it says."""
    for file in files:
        if shard := _SHARD.fullmatch(file):
            front, _, count, back = shard.groups()
            for number in range(int(count)):
                other = f"{front}{number:05}-of-{count}{back}"
                if other not in files:
                    raise ConfigError(
                        f"task.path={repo}: the hub's cache has {file} and not {other}, and HF_HUB_OFFLINE is set, so "
                        "rows would be missing: unset HF_HUB_OFFLINE once"
                    )


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into one sentence."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(
            f"task.path={repo} is gated, so its files cannot be downloaded yet: accept its terms on "
            f"{endpoint}/datasets/{repo}, then run hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(
            f"task.revision={revision}: {repo} has no branch, tag or commit of this name, so there are no rows"
            f"{_revisions(repo)}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"task.path={repo} is neither a file or folder on this machine nor a data set of {endpoint} that this user "
            "may read, so there are no rows: correct the path, or for a private data set run hf auth login"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if not constants.is_offline_mode():
            raise _not_reached(repo, endpoint, error) from None
        raise ConfigError(
            f"task.path={repo} is not in the hub's cache, and HF_HUB_OFFLINE is set, so there are no rows: unset it "
            "once, or name a file on this machine"
        ) from None
    except (_network_error(), OSError) as error:
        raise _not_reached(repo, endpoint, error) from None


def _not_reached(repo: str, endpoint: str, error: Any) -> ConfigError:
    return ConfigError(
        f"task.path={repo} cannot be downloaded from {endpoint} ({_reason(error)}), so there are no rows: check the "
        "network, name a file on this machine, or set HF_HUB_OFFLINE=1 to use what the hub's cache has"
    )


def _revisions(repo: str) -> str:
    """The branches and tags of a data set, for a message; empty where they cannot be listed."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo, repo_type="dataset")
    except (_network_error(), OSError):
        return ": correct it"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f": choose one of {', '.join(names)}, or a commit" if names else ": correct it"


def _network_error() -> type[Exception]:
    """The base class of what the hub's library raises of the network. The library has changed from requests to httpx to
    httpx2, so it is taken from an error of its own rather than imported."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__bases__[0]


def _reason(error: Any) -> str:
    """The first line of an error of the network, with the status of the answer if there was one."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
