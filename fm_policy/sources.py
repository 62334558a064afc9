"""Which code ran: a fingerprint of source files, since a version stays the same between two releases."""

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


def source_fingerprint(packages: Iterable[str]) -> str:
    """SHA-256 over the names and contents of all Python files of some packages, which need not be imported.

    Raises:
        ModuleNotFoundError: One is not installed, or is no package.
    """
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{package} is not an installed package", name=package)
        root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob("*.py")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{package}/{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()
