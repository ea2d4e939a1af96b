"""What every test shares: one thread, one seed, a way around the checks of types and shapes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import jaxtyping
import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image

from processes import run_in

torch.set_num_threads(1)
_OF_BOTH = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("default", max_examples=25, derandomize=True, **_OF_BOTH)
settings.register_profile("campaign", max_examples=600, print_blob=True, **_OF_BOTH)
settings.load_profile("default")
# Without a GPU the kernels run in Triton's interpreter, which reads this as triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _no_kernels_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `headwise compile` built on this machine must not decide what is tested."""
    with _cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No jaxtyping inside: what it would refuse reaches the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def verbosity() -> Iterator[None]:
    """A command quiets transformers for good; other tests do not feel it."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()


@pytest.fixture
def fails(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Calls a command that ends with that status; stderr as one line, without frames."""
    from headwise.cli import main

    def call(status: int, *arguments: object, quiet: bool = True) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert end.value.code == status
        assert not (quiet and printed.out)
        return " ".join(printed.err.replace("│", " ").split())

    return call


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[..., None]:
    """Runs function(rank, *arguments), of a test's module, in two processes that know each other.

    What it raises in one of them, the test raises.
    """
    return partial(run_in, 2, f"file://{tmp_path / 'store'}")


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of text that a run can train on."""
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    file.write_text("".join(f"the square of {i} is {i * i}\n" for i in range(1000)))
    return str(file)


@pytest.fixture(scope="session")
def bright_and_dark(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a directory of images of two classes that anything can tell apart.

    Each class is a directory of so many squares of that shape.
    """

    def make(number: int, *shape: int) -> Path:
        root = tmp_path_factory.mktemp("pictures")
        generator = np.random.default_rng(0)
        for name, low in (("bright", 150), ("dark", 0)):
            (root / name).mkdir()
            for i in range(number):
                pixels = generator.integers(low, low + 100, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i}.png")
        return root

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitize", action="store_true", help="build kernels with sanitizers")
    parser.addoption(
        "--level", help="try the kernels that a wheel has for this level of processors"
    )


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory with kernels built for this machine, once for all processes of a run.

    With --level those of a wheel stand beside it, and none are built for this machine.
    """
    from headwise.ops.native.build import build, build_level, missing_tools

    if missing := missing_tools():
        pytest.skip(f"{missing} not found")
    root = tmp_path_factory.getbasetemp()
    home = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "kernels"
    with _cache(home):
        level = request.config.getoption("--level")
        if level is None:
            build(sanitize=request.config.getoption("--sanitize"))
        else:
            with FileLock(home.with_suffix(".lock")):
                if not (compiled := home / "compiled").exists():
                    compiled.mkdir(parents=True)
                    build_level(level, compiled)
    return home


@pytest.fixture
def own_kernels(request: pytest.FixtureRequest, kernels: Path) -> Path:
    """The library that was built for this machine."""
    if level := request.config.getoption("--level"):
        pytest.skip(f"--level {level}: none is built for this machine")
    return next((kernels / "headwise").glob("native-*.so"))


@pytest.fixture(scope="module")
def native_kernels(kernels: Path) -> Iterator[None]:
    """Kernels are built, as "auto" sees it."""
    with _cache(kernels) as native:
        assert native.is_built()
        yield


@pytest.fixture(scope="module", params=[True, False], ids=["kernels", "no kernels"])
def kernels_built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[bool]:
    """Once kernels are built, and once none are."""
    built: bool = request.param
    home = request.getfixturevalue("kernels") if built else tmp_path_factory.mktemp("none")
    with _cache(home) as native:
        assert native.is_built() is built
        yield built


@contextmanager
def _cache(home: Path) -> Iterator[ModuleType]:
    # Imported here: it brings triton, which reads its environment as it is imported.
    from headwise.ops import native
    from headwise.ops.native import kernel_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(kernel_file, "compiled_directory", lambda: home / "compiled")
        native.forget()
        yield native
    native.forget()
