"""Files that are whole or not there, even if the process or the machine stops; and their sums."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.errors import UnreadableError, reading

MANIFEST = "manifest.json"


def write_json(path: Path, value: Any) -> None:
    """Write beside, then rename."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file or directory beside `path`, then put it in place."""
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        write(partial)
        put_in_place(partial, path)
    except BaseException:
        remove(partial)
        raise


def check_new(field: str, path: Path, *, or_empty: bool = False) -> None:
    """Refuse to write where there is something already, but for an empty directory if `or_empty`.

    Raises:
        ValueError: Naming the field and the path.
    """
    if path.exists() and not (or_empty and path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{field} is {path}, which exists; choose another")


def partial_of(path: Path) -> Path:
    """Where `write_whole` writes before it renames to `path`; a kill may leave it behind."""
    return path.with_name(f".{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file or directory once the disk has all of it; what was at `path` before is gone.

    The disk must have it first: else a machine that loses its power may keep the new name and lose
    the content.
    """
    _sync(partial)
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)
    _sync_entry(path.parent)


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_manifest(directory: Path) -> None:
    """Write the sha256 of each file in a directory; do so before the directory is put in place."""
    manifest = directory / MANIFEST
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != manifest]
    sums = {path.relative_to(directory).as_posix(): _sha256(path) for path in files}
    manifest.write_text(json.dumps(sums, indent=2) + "\n")


def check_manifest(directory: Path, hint: str) -> None:
    """Check that all files that `write_manifest` found in a directory are there, bit for bit.

    Raises:
        UnreadableError: Naming the file that is missing or is not what was written; `hint` ends it.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise UnreadableError(f"{manifest} is missing; {hint}")
    with reading(manifest, hint=hint):
        sums = as_object(json.loads(manifest.read_text()))
    for name, expected in sums.items():
        file = directory / name
        if not file.is_file():
            raise UnreadableError(f"{file} is missing; {hint}")
        if _sha256(file) != expected:
            raise UnreadableError(
                f"{file} is damaged, its sha256 is not the one in {MANIFEST}; {hint}"
            )


def as_object(value: Any) -> dict[str, Any]:
    """The value, which must be a JSON object with entries.

    Raises:
        ValueError: If the value is anything else.
    """
    if not isinstance(value, dict) or not value:
        raise ValueError(f"it holds {json.dumps(value)[:40]} where an object with entries belongs")
    return value


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # which Windows does not open, and need not
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
