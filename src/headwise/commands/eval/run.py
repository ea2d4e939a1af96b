"""What `headwise eval` scores: models, and tasks or images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from headwise.ops.choice import check_choice
from headwise.results.files import check_new
from headwise.training.fields import Precision

_OF_TASKS, _OF_IMAGES = ("data", "num_fewshot"), ("split", "image_size")


@dataclass(frozen=True)
class EvalRun:
    """Score models side by side, with standard errors.

    Language models take --tasks, of lm-evaluation-harness; image classifiers take --images: top-1
    and top-5, and the share of their heads that are on.

    Attributes:
        models: Directories as transformers saves them, converted or not, or names on the Hugging
            Face hub; for example the original first and what was made of it after it.
        tasks: Names that the harness knows, task files (YAML) or directories of them, or what the
            MoH paper measured: paper-llm (0 shots), paper-llama (0 to 32 shots).
        images: Images with classes: a Parquet file, a directory with a directory for each class, or
            a Hugging Face dataset's name; or digits, which are scikit-learn's. A model's own image
            processor prepares them.
        split: Which of the images: held-out, the tenth that `headwise train vit` holds out of the
            same images, or a split of a Hugging Face dataset by name. Without it all of a file or
            directory, the dataset's test split, the held-out tenth of the digits.
        image_size: Side to which images are cropped and resized before a model's own processor
            sees them; needed where they are not squares of one size.
        data: Directories with documents for the tasks, instead of those that the harness fetches:
            TASK.json for piqa, arc_easy, openbookqa, winogrande and boolq_no_passage (boolq.json),
            a list of {"instruction": …, "answer": …} of which docs/convert.md shows one, and
            NAME.jsonl for blimp_NAME.
        num_fewshot: Examples before each question; without it the preset's or the task's own. Tasks
            that the harness fixes at 0 stay there.
        limit: How many to take: of each task the first documents, or images from everywhere;
            without it all.
        batch_size: Texts or images at a time; the scores do not depend on it.
        precision: Of weights and activations: fp32 or bf16.
        output: Directory for eval.json and eval.csv; must not hold anything yet.
        seed: Seed of the choice of shots; the harness's own by default.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR …")]
    tasks: tuple[str, ...] = ()
    images: str | None = None
    split: str | None = None
    image_size: int | None = None
    data: tuple[Path, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    precision: Precision = "fp32"
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty; give at least one directory or name")
        self._check_kind()
        least_values = {"num_fewshot": 0, "limit": 1, "batch_size": 1, "image_size": 1, "seed": 0}
        for field, least in least_values.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} is {value}; it must be at least {least}")
        for directory in self.data:
            if not directory.is_dir():
                raise ValueError(f"data is {directory}, where there is no directory")
        check_choice("precision", self.precision, Precision)
        if self.output is not None:
            check_new("output", self.output, or_empty=True)

    @property
    def dtype(self) -> str:
        """Of weights and activations, as torch calls it."""
        return {"fp32": "float32", "bf16": "bfloat16"}[self.precision]

    def _check_kind(self) -> None:
        """Tasks or images, and no field of the other."""
        if bool(self.tasks) == bool(self.images):
            both = "both given" if self.tasks else "both empty"
            raise ValueError(
                f"tasks and images are {both}; give tasks to score language models, images to "
                "score image classifiers"
            )
        given, other, wrong = (
            ("tasks", "images", _OF_IMAGES) if self.tasks else ("images", "tasks", _OF_TASKS)
        )
        for field in wrong:
            if (value := getattr(self, field)) not in (None, ()):
                raise ValueError(f"{field} is {value}; it goes with {other}, not with {given}")
