"""Files and folders that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, and the folders above it that are not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


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
