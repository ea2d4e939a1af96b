"""The directory of a run: who may write into it, and whether it still is what was written."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numpy.typing import NDArray

from headwise.errors import reading
from headwise.results.files import as_object, check_manifest, partial_of, remove, write_json
from headwise.training.fields import TrainingRun

RUN_FILE = "run.json"
MODELS = "models"
_LOCK_FILE = ".lock"
# What may differ between a run and its continuation.
_FREE_TO_CHANGE = {"output", "resume", "overwrite", "report_to", "workers", "speed_contexts"}


class RunDirectory:
    """Layout of a run.

    run.json                  the resolved configuration and a fingerprint of the text
    models/NAME/              finished models and tokenizer, as AutoModel takes them
    checkpoints/NAME/         Trainer's checkpoints
    logs/NAME.log             what a model printed that was trained in a process of its own
    pictures/                 of image models: maps of their heads, what they drew
    results.csv search.csv heads.csv experts.csv figure.png record.json report.html
    .lock                     number of the process that works in it, or of the last one

    NAME is a model's, with its seed, and with its learning rate where that is not the run's:
    moh_75-seed0-lr0.006. Each model and each checkpoint has a manifest.json, the sums of its files.
    """

    def __init__(self, root: Path):
        self.root = root

    def model(self, name: str) -> Path:
        """Where a finished model lies."""
        return self.root / MODELS / name

    def checkpoints(self, name: str) -> Path:
        """Where Trainer keeps checkpoints of a model."""
        return self.root / "checkpoints" / name

    def log(self, name: str) -> Path:
        """What a process of its own printed while it trained a model."""
        return self.root / "logs" / f"{name}.log"

    def check(self, run: TrainingRun) -> None:
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
        elif not file.exists() and self.root.is_dir() and not self._is_new():
            raise ValueError(f"output {self.root} holds files that are no run; choose another")

    @contextmanager
    def held_by(self, run: TrainingRun, fingerprint: dict[str, str]) -> Iterator[None]:
        """Make the directory this run's, or go on with the same run on the same text.

        While the context is open, no other process may; the lock ends with the process, however
        that ends.

        Raises:
            ValueError: As `check`; if another process works in it, the data to resume with have
                changed, or a finished model is not what was written. Nothing is touched.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.check(run)
            if run.resume:
                if self._read()["fingerprint"] != fingerprint:
                    raise ValueError(f"the data have changed since the run in {self.root} began")
                self._check_models()
            else:
                self._clear()
                file = self.root / RUN_FILE
                write_json(file, {"run": resolved(run), "fingerprint": fingerprint})
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        file = self.root / _LOCK_FILE
        try:
            lock = FileLock(file).acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"process {file.read_text()} works in {self.root}; wait until it has ended, or end "
                "it"
            ) from None
        with lock:
            file.write_text(str(os.getpid()))
            yield

    def _is_new(self) -> bool:
        """Whether nothing is in it but what a kill leaves before a run has begun."""
        ours = {self.root / _LOCK_FILE, partial_of(self.root / RUN_FILE)}
        return ours.issuperset(self.root.iterdir())

    def _clear(self) -> None:
        # run.json last: killed before, the directory is still known for a run's.
        inside = sorted(self.root.iterdir(), key=lambda path: path.name == RUN_FILE)
        for path in inside:
            if path.name != _LOCK_FILE:
                remove(path)

    def _check_models(self) -> None:
        for model in sorted((self.root / MODELS).glob("[!.]*")):
            check_manifest(model, f"delete {model} to train that model again")

    def _check_same_run(self, run: TrainingRun) -> None:
        if not (self.root / RUN_FILE).exists():
            raise ValueError(f"output {self.root} holds no run to resume; start without --resume")
        saved = self._read()["run"]
        for field, value in resolved(run).items():
            if field not in _FREE_TO_CHANGE and saved.get(field) != value:
                raise ValueError(
                    f"{field} is {value}, but the run in {self.root} has {saved.get(field)}; "
                    "resume with the same fields"
                )

    def _read(self) -> dict[str, dict[str, Any]]:
        file = self.root / RUN_FILE
        with reading(file, hint="--overwrite deletes the run and starts anew"):
            saved = as_object(json.loads(file.read_text()))
            return {part: as_object(saved[part]) for part in ("run", "fingerprint")}


def check_parents(output: Path) -> None:
    """Raises ValueError if a file is where `output` needs a directory to lie in."""
    if file := next((path for path in output.parents if path.is_file()), None):
        raise ValueError(f"output is {output}, but {file} is a file; it must be a directory")


def resolved(fields: Any) -> dict[str, Any]:
    """The fields of a run, a dataclass, as JSON keeps them."""
    return json.loads(json.dumps(dataclasses.asdict(fields), default=str))


def fingerprint(tokens: Mapping[str, Iterable[NDArray[Any]]]) -> dict[str, str]:
    """Of the tokens of each domain: what a run that resumes must find again."""
    digests = {domain: hashlib.sha256() for domain in tokens}
    for domain, parts in tokens.items():
        for part in parts:
            digests[domain].update(part.tobytes())
    return {domain: digest.hexdigest() for domain, digest in digests.items()}
