"""What can be wrong with the files of a directory, one after another, without chance."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import sha256
from itertools import compress, cycle
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WRONG = (None, [], -1, 0, 3, 10**12, "x")
# Of which file, what is done to it, and what does it, given the file.
Damage = tuple[str, str, Callable[[Path], None]]


def damages(directory: Path) -> Iterator[Damage]:
    """Of each file."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(file.relative_to(directory))
        yield name, "removed", Path.unlink
        yield name, "a directory", _as_directory
        yield name, "emptied", empty
        yield name, "halved", halve
        yield name, "a bit in the middle flipped", partial(flip_a_bit, bit=6)
        yield name, "a bit of its first byte flipped", partial(flip_a_bit, bit=6, at=0)
        if file.suffix in (".json", ".jsonl"):
            for text in ("[]", "{}", "null", "3", '"x"'):
                yield name, f"now {text}", write(text)
            yield name, "nested deeply", write("[" * 100_000)


def wrong_values(file: Path) -> Iterator[Damage]:
    """For each field of an object in JSON a value of another kind, or none."""
    fields: dict[str, Any] = json.loads(file.read_text())
    for name in fields:
        without = {key: x for key, x in fields.items() if key != name}
        yield file.name, f"without {name}", write(json.dumps(without))
        for value in WRONG:
            yield file.name, f"{name} {value!r}", write(json.dumps(fields | {name: value}))


def two_fifths(cases: Iterable[Damage]) -> Iterator[Damage]:
    """Some of what is done to each file or field, others to the next: all kinds come up."""
    return compress(cases, cycle((True, False, True, False, False)))


def contents(directory: Path) -> dict[str, str]:
    """What lies in a directory, and a digest of each file."""
    paths = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    return {
        name: sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for name, path in paths.items()
    }


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path, bit: int = 7, at: int | None = None) -> None:
    """Of the byte in the middle, or of the one at a place; without bit 7 it may still be text."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1 << bit
    file.write_bytes(content)


def write(text: str) -> Callable[[Path], None]:
    """What makes a file hold that text."""

    def damage(file: Path) -> None:
        file.write_text(text)

    return damage


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """What `edit` does to the content of a file."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_weights(
    directory: Path, edit: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors"
) -> None:
    """What `edit` does to the weights of a model."""
    weights = load_file(directory / name)
    edit(weights)
    save_file(weights, directory / name, metadata={"format": "pt"})


def _as_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def damaged_copy(directory: Path, copy: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """The directory beside itself, one file of it damaged."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    damage(copy / name)
    return copy
