"""What can be wrong with the files of a directory, one after another, without chance."""

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

WRONG = (None, [], -1, 0, 3, 10**12, "x")
# Of which file, what is done to it, and what does it, given the file.
Damage = tuple[str, str, Callable[[Path], None]]


def damages(directory: Path) -> Iterator[Damage]:
    """Of each file."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(file.relative_to(directory))
        yield name, "removed", Path.unlink
        yield name, "a directory", _as_directory
        content = file.read_bytes()
        half = len(content) // 2
        flipped = bytearray(content)
        flipped[half] ^= 64
        header = bytearray(content)
        header[0] ^= 64
        contents = {
            "emptied": b"", "halved": content[:half], "a bit in the middle flipped": flipped,
            "a bit of its first byte flipped": header,
        }  # fmt: skip
        if file.suffix in (".json", ".jsonl"):
            contents |= {f"now {x}": x.encode() for x in ("[]", "{}", "null", "3", '"x"')}
            contents["nested deeply"] = b"[" * 100_000
        for how, new in contents.items():
            yield name, how, _written(bytes(new))


def wrong_values(file: Path) -> Iterator[Damage]:
    """For each field of an object in JSON a value of another kind, or none."""
    fields: dict[str, Any] = json.loads(file.read_text())
    for name in fields:
        without = {key: x for key, x in fields.items() if key != name}
        yield file.name, f"without {name}", _written(json.dumps(without).encode())
        for value in WRONG:
            changed = json.dumps(fields | {name: value}).encode()
            yield file.name, f"{name} {value!r}", _written(changed)


def contents(directory: Path) -> dict[str, str]:
    """What lies in a directory, and a digest of each file."""
    paths = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    return {
        name: sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for name, path in paths.items()
    }


def _written(content: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(content)

    return write


def _as_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def damaged_copy(directory: Path, copy: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """The directory beside itself, one file of it damaged."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    damage(copy / name)
    return copy
