"""Files and folders that are written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, and the folders above it that are not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file, and the folders above it; each entry of `about` becomes JSON in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".part")
    contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contents, draft, {name: json.dumps(value) for name, value in about.items()})
    os.replace(draft, file)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of such a file.

    Raises:
        OSError: If it cannot be read.
        safetensors.SafetensorError: If it is no safetensors file, or cut off.
        ValueError: If its metadata are no JSON.
    """
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(value) for name, value in (opened.metadata() or {}).items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of the numbers in tensors, in their order: whether they are those of another time."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something, or a file.

    Raises:
        ValueError: If it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another one")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A draft of a folder, which takes its place when the block ends, and is gone if that fails.

    Args:
        folder: Absent or empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
        draft = Path(beside, folder.name)
        draft.mkdir()
        yield draft
        os.replace(draft, folder)
