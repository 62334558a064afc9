"""A checkpoint to a folder that runs alone: graph, settings, runner. Whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

from fm_policy.deploy.graph import Policy, write_onnx, write_pt2
from fm_policy.deploy.runner import SETTINGS
from fm_policy.deploy.settings import settings_of
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.files import new_folder

FORMATS = {"onnx": write_onnx, "pt2": write_pt2}


def export(path: Path, folder: Path, nfe: int | None = None, solver: str | None = None, form: str = "onnx") -> Policy:
    """Export a checkpoint.

    Args:
        path: Folder of the checkpoint.
        folder: Where to; must not exist.
        nfe: Another number of network calls per chunk than the checkpoint's.
        solver: Another solver than the checkpoint's.
        form: `onnx`, or `pt2` for torch.export's.

    Returns:
        The checkpoint as it was exported.

    Raises:
        ValueError: If the folder exists, the format is unknown, or the checkpoint is broken or cannot be exported,
            see `settings_of`.
        ModuleNotFoundError: If ONNX is not installed.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}: expected one of {list(FORMATS)}")
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists: choose another folder")
    checkpoint = _load(path, nfe, solver)
    try:
        settings = settings_of(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path} cannot be exported: {error}") from error
    with new_folder(folder) as whole:
        graph = whole / f"policy.{form}"
        FORMATS[form](checkpoint, graph)
        settings["graph"] = {"file": graph.name, "sha256": hashlib.sha256(graph.read_bytes()).hexdigest()}
        (whole / SETTINGS).write_text(json.dumps(settings, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name in ("runner.py", "envelope.py"):
            source = Path(__file__).with_name(name).read_text(encoding="utf-8")
            (whole / name).write_text(_alone(source), encoding="utf-8")
    return checkpoint


def _load(path: Path, nfe: int | None, solver: str | None) -> Policy:
    try:
        return load_checkpoint(path, solver=solver, nfe=nfe)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a broken checkpoint: {error!r}") from error


def _alone(source: str) -> str:
    """The source of a module of this package, for a folder where its neighbours lie beside it and no package is."""
    return source.replace("from fm_policy.deploy.", "from ")
