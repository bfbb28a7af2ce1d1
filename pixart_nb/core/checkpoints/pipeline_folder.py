"""Folders of whole pipelines: in the layout of diffusers, in that of mindone's example, or from a hub."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from pixart_nb.config import bundled_path
from pixart_nb.core.checkpoints.files import ENDINGS
from pixart_nb.core.io import CheckpointError, read_json


def component_paths(source: str | Path, names: Sequence[str], revision: str | None = None) -> dict[str, Path]:
    """Return the paths of the components of a pipeline.

    ``source``: a folder in the layout of diffusers, or in that of mindone's example (a checkpoint beside the folders
    vae, text_encoder and tokenizer, or in a folder ``models`` with or beside them); the checkpoint in such a folder, if
    there are several; or a hub id, with ``revision``. mindone's layout has no scheduler, which is then left out.
    Raises ``CheckpointError``.
    """
    path = bundled_path(source)
    if path.is_file():
        return _mindone_paths(path.parent, names, path)
    folder = path if path.is_dir() else _from_hub(str(source), names, revision)
    if not (folder / "model_index.json").is_file():
        return _mindone_paths(folder, names)
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks the folders {missing}; give those components, or None if not needed")
    return {name: folder / name for name in names}


def pipeline_class(source: str | Path) -> str:
    """Return the class name in the ``model_index.json`` of a folder or hub id; empty if there is none."""
    path = bundled_path(source)
    folder = path.parent if path.is_file() else path if path.is_dir() else _from_hub(str(source), [], None)
    index = folder / "model_index.json"
    return str(read_json(index).get("_class_name", "")) if index.is_file() else ""


def _mindone_paths(folder: Path, names: Sequence[str], checkpoint: Path | None = None) -> dict[str, Path]:
    roots = (folder, folder / "models")
    checkpoints = [checkpoint] if checkpoint else [path for root in roots for path in _checkpoints(root)]
    if "transformer" in names and len(checkpoints) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints ({', '.join(p.name for p in checkpoints[:6])}); give the path of the "
            "one to load"
        )
    folders = [name for name in names if name != "transformer"]
    paths = {name: root / name for root in reversed(roots) for name in folders if (root / name).is_dir()}
    if checkpoints:
        paths["transformer"] = checkpoints[0]
    missing = [name for name in names if name not in (*paths, "scheduler")]
    if missing:
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is no pipeline in diffusers' layout; and it lacks {missing} "
            "for the layout of mindone, a checkpoint and the folders vae, text_encoder and tokenizer. It holds "
            f"{sorted(part.name for part in folder.iterdir())[:10]}. Give those components, or None if not needed."
        )
    return {name: paths[name] for name in names if name in paths}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in ENDINGS and path.is_file())


def _from_hub(source: str, names: Sequence[str], revision: str | None) -> Path:
    """Return the folder of a snapshot; a path that can only be a local one is not looked up."""
    path, files = Path(source).expanduser(), " and ".join(["model_index.json", *names])
    local = source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in ENDINGS
    if local or path.parent.is_dir():
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise CheckpointError(
            f"{source} does not exist.{hint} Give a folder with {files}, or the id of a model on a hub, owner/name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["model_index.json", *(f"{name}/*" for name in names)]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{source!r} is no folder here and could not be fetched from the hub ({type(error).__name__}). Download "
            f"its folder ({files}) and give the path."
        ) from error


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
