"""Where a checkpoint's files are: a folder of this machine, or a model of the hub in its cache, downloaded when it must be.

Only safetensors, the config and the tokenizer are taken. A download that was cut goes on where it stopped, and one that
the disk has no room for is not begun. The revision that was asked for is a name; the commit it stood for is recorded.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from reference import DeepseekV32Config
from reference.checkpoint import read_config
from reports.text import one_line

from ..dispatch.local import CUT

FILES = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
DEFAULT_REVISION = "main"
# What a download leaves free on the disk, for logs, records and other programs.
SPARE_BYTES = 2 << 30
# What the transport raises comes of a package that differs between versions of the hub's client, and has this base in all.
_TRANSPORT = HfHubHTTPError.__bases__[0]
# What Python's own sockets and the client of large files raise; of a failure that has no class of its own the latter says
# RuntimeError.
_CUT = (_TRANSPORT, ConnectionError, TimeoutError, RuntimeError)
# The hub's answers that another attempt may change, besides those of a server that failed: too slow, too many requests.
_AGAIN = (408, 429)
# The hub's client says so, in an error without a class of its own, of a file that came short.
_SHORT = "Consistency check failed"


@dataclass(frozen=True, slots=True)
class Source:
    """The folder that holds a checkpoint, and for one of the hub its name there and the commit; both empty for a folder."""

    directory: Path
    hub_id: str = ""
    commit: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """What a model of the hub takes: bytes of all its files, bytes that are not in the cache yet, and the commit."""

    total_bytes: int
    missing_bytes: int
    commit: str


def locate(
    name: str, revision: str | None = None, *, downloaded: bool = False,
    announce: Callable[[Missing], None] = lambda _: None,
) -> Source:  # fmt: skip
    """The checkpoint called `name`: a folder, or a name on the hub, whose files are fetched as far as they are missing.

    Args:
        revision: branch, tag or commit on the hub. downloaded: the cache has all of it, and the hub is not asked.
        announce: told what is missing, before the download begins.

    Raises:
        CutError: the hub did not answer, or not to the end; what came whole stays.
        ValueError: neither a folder nor a model that the hub or its cache gives; a revision for a folder; a full disk.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"--revision is {revision!r}, but --checkpoint {name} is a folder, which has no revisions."
            )
        return Source(Path(name))
    if Path(name).exists():
        raise ValueError(
            f"--checkpoint is {name}, a file; it must be the folder that holds config.json and the weights."
        )
    if not downloaded:
        missing = look_up(name, revision)
        if missing is not None:
            announce(missing)
            check_disk(missing.missing_bytes, Path(constants.HF_HUB_CACHE), name)
    # Offline, some versions of the hub's client ask the network for what they know of a commit that the cache has.
    found = Path(str(_snapshot(name, revision, local_files_only=downloaded or constants.HF_HUB_OFFLINE)))
    return Source(found, name, found.name)


def look_up(name: str, revision: str | None = None) -> Missing | None:
    """What the hub says of `name`, without a download; None where the hub cannot be reached.

    Raises:
        ValueError: not a name that a model can have.
    """
    try:
        files = _snapshot(name, revision, dry_run=True)
    except UnreachableError:
        return None
    assert isinstance(files, list)
    total = sum(file.file_size or 0 for file in files)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    return Missing(total, missing, files[0].commit_hash if files else "")


def config_of(name: str, revision: str | None = None) -> DeepseekV32Config | None:
    """The config of a model on the hub, which alone is fetched; None where the hub does not give it.

    Raises:
        ValueError: a config of another model.
    """
    try:
        found = _snapshot(name, revision, allow_patterns=["config.json"])
    except UnreachableError:
        return None
    return read_config(Path(str(found)))


class UnreachableError(ValueError):
    """The hub does not give what was asked for, and the cache does not have it."""


class CutError(UnreachableError):
    """The hub did not answer, or its answer ended early: no word on what was asked for, and worth another attempt."""


def _snapshot(name: str, revision: str | None, **how: Any) -> Any:
    try:
        return snapshot_download(name, revision=revision or DEFAULT_REVISION, **{"allow_patterns": list(FILES), **how})
    except HFValidationError as error:
        raise ValueError(
            f"--checkpoint is {name!r}, which is no folder here, and no name that a model on the hub can have."
        ) from error
    except Exception as error:
        if _was_cut(error):
            raise CutError(
                f"--checkpoint is {name!r}, and {CUT} or never came: {one_line(str(error)).rstrip('.')}. Whole files stay, and "
                "the same command goes on; where there is no network, give the folder of a checkpoint that was downloaded "
                "elsewhere."
            ) from error
        if not isinstance(error, OSError):
            raise
        raise UnreachableError(
            f"--checkpoint is {name!r}, which is no folder here, and neither the hub nor its cache gives it: {one_line(str(error))} "
            "Where there is no network, give the folder of a checkpoint that was downloaded elsewhere."
        ) from error


def _was_cut(error: BaseException) -> bool:
    """Whether the network or the hub's server failed, by the error or what it came from."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in _AGAIN
    if isinstance(error, _CUT) or _SHORT in str(error):
        return True
    return error.__cause__ is not None and _was_cut(error.__cause__)


def check_disk(needed: int, folder: Path, name: str) -> None:
    """Refuse what the disk has no room for.

    Raises:
        ValueError: fewer than `needed` bytes and a margin are free where `folder` is, or will be.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed and free < needed + SPARE_BYTES:
        raise ValueError(
            f"--checkpoint {name} needs {gigabytes(needed + SPARE_BYTES)} of disk, of which {gigabytes(SPARE_BYTES)} stay free, "
            f"and {gigabytes(free)} are free for the hub's cache: make room, or set HF_HOME to a folder on a larger disk."
        )


def gigabytes(size: float) -> str:
    """Bytes in GB, MB or kB (powers of 1000) with as many digits as one reads."""
    unit, value = next(((u, size / n) for u, n in (("GB", 1e9), ("MB", 1e6)) if size >= n / 10), ("kB", size / 1e3))
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
