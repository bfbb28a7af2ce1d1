"""Files of a model on a hub: only those that are read are fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from pixart_nb.core.checkpoints.files import ENDINGS, unread_files
from pixart_nb.core.errors import did_you_mean
from pixart_nb.core.io import CheckpointError


def from_hub(
    source: str | Path,
    patterns: Sequence[str],
    expected: str,
    hub: Mapping[str, Any],
    formats: Mapping[str, Any] | None = None,
) -> Path:
    """Return the folder of a snapshot with the files of ``patterns``, which hold what is ``expected``.

    A path that can only be a local one is not looked up. ``formats`` (``variant`` and ``use_safetensors`` of
    ``open_checkpoint``): weights in other formats and variants, which would not be read, are not fetched. None fetches
    all.
    """
    source, path = str(source), Path(source).expanduser()
    local = source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in ENDINGS
    if local or path.parent.is_dir():
        beside = [part.name for part in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(
            f"{source} does not exist{did_you_mean(path.name, beside)}. Give a folder with {expected}, or the id of a "
            "model on a hub, owner/name."
        )
    try:
        unread = [] if formats is None else _unread_on_hub(source, hub, formats)
        options = {"allow_patterns": list(patterns), "ignore_patterns": unread}
        return Path(huggingface_hub.snapshot_download(source, **hub, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{source!r} is no folder here and could not be fetched from the hub ({type(error).__name__}). Download "
            f"its folder ({expected}) and give the path."
        ) from error


def _unread_on_hub(source: str, hub: Mapping[str, Any], formats: Mapping[str, Any]) -> list[str]:
    if hub.get("local_files_only"):
        return []
    try:
        files = huggingface_hub.HfApi(token=hub.get("token")).list_repo_files(source, revision=hub.get("revision"))
    except Exception:  # noqa: BLE001 - of the HTTP library, which differs by version; the download names it
        return []
    return unread_files(files, **formats)
