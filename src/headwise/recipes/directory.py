"""The directory of a run: who may write into it, and files that are whole or not there."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

RUN_FILE = "run.json"
MODELS = "models"
# What may differ between a run and its continuation.
_FREE_TO_CHANGE = {"output", "resume", "overwrite", "report_to", "workers", "speed_contexts"}


class RunDirectory:
    """Layout of a run.

    run.json                  the resolved configuration and a fingerprint of the text
    models/NAME-seedS/        finished models and tokenizer, as AutoModel takes them
    checkpoints/NAME-seedS/   Trainer's checkpoints
    logs/NAME-seedS.log       what a model printed that was trained in a process of its own
    pictures/                 of image models: maps of their heads, what they drew
    results.csv experts.csv figure.png record.json report.html
    """

    def __init__(self, root: Path):
        self.root = root

    def model(self, name: str, seed: int) -> Path:
        """Where a finished model lies."""
        return self.root / MODELS / f"{name}-seed{seed}"

    def checkpoints(self, name: str, seed: int) -> Path:
        """Where Trainer keeps checkpoints of a model."""
        return self.root / "checkpoints" / f"{name}-seed{seed}"

    def log(self, name: str, seed: int) -> Path:
        """What a process of its own printed while it trained a model."""
        return self.root / "logs" / f"{name}-seed{seed}.log"

    def check(self, run: Any) -> None:
        """Whether the run may have the directory; nothing is touched.

        Raises:
            ValueError: If it holds something else, or another run than the one to resume.
        """
        file = self.root / RUN_FILE
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output is {self.root}, a file; it must be a directory")
        check_parents(self.root)
        if run.resume:
            self._check_same_run(run)
        elif file.exists() and not run.overwrite:
            raise ValueError(
                f"output {self.root} already holds a run; choose another, --resume to go on with "
                "it, or --overwrite to delete it"
            )
        elif not file.exists() and self.root.is_dir() and any(self.root.iterdir()):
            raise ValueError(f"output {self.root} holds files that are no run; choose another")

    def claim(self, run: Any, fingerprint: dict[str, str]) -> None:
        """Make the directory this run's, or go on with the same run on the same text.

        Raises:
            ValueError: As `check`, or if the data to resume with have changed; nothing is touched.
        """
        self.check(run)
        file = self.root / RUN_FILE
        if run.resume:
            if json.loads(file.read_text())["fingerprint"] != fingerprint:
                raise ValueError(f"the data have changed since the run in {self.root} began")
            return
        if file.exists():
            shutil.rmtree(self.root)
        write_json(file, {"run": resolved(run), "fingerprint": fingerprint})

    def _check_same_run(self, run: Any) -> None:
        file = self.root / RUN_FILE
        if not file.exists():
            raise ValueError(f"output {self.root} holds no run to resume; start without --resume")
        saved = json.loads(file.read_text())["run"]
        for field, value in resolved(run).items():
            if field not in _FREE_TO_CHANGE and saved.get(field) != value:
                raise ValueError(
                    f"{field} is {value}, but the run in {self.root} has {saved.get(field)}; "
                    "resume with the same fields"
                )


def check_parents(output: Path) -> None:
    """Raises ValueError if a file is where `output` needs a directory to lie in."""
    if file := next((path for path in output.parents if path.is_file()), None):
        raise ValueError(f"output is {output}, but {file} is a file; it must be a directory")


def resolved(run: Any) -> dict[str, Any]:
    """All fields of a run as JSON keeps them."""
    return json.loads(json.dumps(dataclasses.asdict(run), default=str))


def fingerprint(tokens: Mapping[str, Iterable[NDArray[Any]]]) -> dict[str, str]:
    """Of the tokens of each domain: what a run that resumes must find again."""
    digests = {domain: hashlib.sha256() for domain in tokens}
    for domain, parts in tokens.items():
        for part in parts:
            digests[domain].update(part.tobytes())
    return {domain: digest.hexdigest() for domain, digest in digests.items()}


def write_json(path: Path, value: Any) -> None:
    """Write beside, then rename."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file or directory beside `path`, then rename it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        write(partial)
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
