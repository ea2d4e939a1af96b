"""The project as a whole: what an import pulls in, README's word, contracts, sizes of files."""

import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import ModuleType

import pytest

import headwise
import headwise.parity
from headwise.cli import _COMMANDS
from headwise.recipes import RECIPES
from processes import run_python
from tiny import RUN, flags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
TABLES = re.findall(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table -->", PAGES, re.DOTALL)
MADE = run_path(str(ROOT / "docs" / "tables.py"))
# torch itself imports triton where it is installed; our kernels are another matter.
HEAVY = (
    "matplotlib", "headwise.ops.attention.triton", "diffusers", "kornia", "sklearn", "timm",
    "torchmetrics",
)  # fmt: skip
MACHINERY = ("datasets", "pandas", "pyarrow", "transformers.trainer", "transformers.training_args")
ONLY_FOR_DEVELOPERS = ("beartype", "pytest", "hypothesis", "tensorboard", "lm_eval", "peft")
PUBLIC = {
    "MoHAttention", "MHMoE", "MoE", "MoHConfig", "MHMoEConfig", "MoEConfig", "convert",
    "load", "restore", "load_released", "balance_loss", "router_z_loss", "record_routing", "ops",
}  # fmt: skip


def files() -> list[Path]:
    """All that git tracks or would."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    printed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in printed.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_import_pulls_in_nothing_heavy():
    # Generation in older versions of transformers brings scikit-learn, where that is installed.
    program = (
        "import sys, transformers.generation.utils; before = set(sys.modules); import headwise\n"
        f"print(sorted({{*{HEAVY}}} & set(sys.modules) - before))"
    )
    assert run_python(program).strip() == "[]"


def test_help_is_quick():
    """It comes without what trains, draws and reads data, which takes seconds to load."""
    calls = [[name] for name in _COMMANDS] + [["train", name] for name in RECIPES]
    program = (
        "import sys, headwise; from contextlib import suppress; from headwise.cli import main\n"
        f"before = set(sys.modules)\nfor call in {calls}:\n"
        "    with suppress(SystemExit): main([*call, '--help'])\n"
        f"print(sorted({{*{(*HEAVY, *MACHINERY)}}} & set(sys.modules) - before))"
    )
    assert run_python(program).splitlines()[-1] == "[]"


def test_works_without_what_only_developers_install(tmp_path):
    # None in sys.modules is how Python says that a module is not there.
    block = f"import sys; sys.modules.update(dict.fromkeys({ONLY_FOR_DEVELOPERS}))\n"
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    tiny = flags(data="text.txt", steps=2, **RUN)
    arguments = ["train", "lm", "--models", "moh_mh_moe", "--output", "run", *tiny]
    run_python(f"{block}from headwise.cli import main; main({arguments})", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


def test_public_names():
    assert set(headwise.__all__) >= PUBLIC
    assert all(hasattr(headwise, name) for name in headwise.__all__)
    operations = ("head_attention", "expert_mlp", "route_heads", "route_tokens")
    assert all(callable(getattr(headwise.ops, name)) for name in operations)
    assert callable(headwise.parity.match_sparse_moe)
    assert callable(headwise.parity.count_flops)


def test_no_name_hides_a_module():
    """What a package calls `name` is its module `name`, where it has one."""
    found = [module.name for module in pkgutil.walk_packages(headwise.__path__, "headwise.")]
    hidden = []
    for package, _, name in (module.rpartition(".") for module in found):
        bound = vars(import_module(package)).get(name)
        if bound is not None and not isinstance(bound, ModuleType):
            hidden.append(f"{package}.{name}")
    assert hidden == [], "a module has the name of what its package defines: rename the module"


def test_public_names_are_documented():
    undocumented = [n for n in headwise.__all__ if not (getattr(headwise, n).__doc__ or "").strip()]
    assert undocumented == []


@pytest.mark.parametrize(("name", "table"), TABLES, ids=[name for name, _ in TABLES])
def test_tables_equal_results(name, table):
    source = MADE["SOURCES"].get(name, name)
    if not MADE["is_measured"](source):
        pytest.skip(f"results/{source}.csv is not measured yet")
    rows = MADE["rows_of"](source)
    assert table.strip() == MADE["TABLES"][name](rows).markdown().strip()


def test_import_contracts_hold():
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_file_is_long():
    names = (p.relative_to(ROOT) for p in files())
    lengths = {
        str(name): (ROOT / name).read_text().count("\n")
        for name in names
        if name.parts[0] in ("src", "tests")
    }
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_no_file_knows_where_it_was_written():
    if len(ROOT.parts) < 3:
        pytest.skip("the checkout's parent is the root directory, which every path holds")
    parent = re.compile(rf"(?<![\w.~/-]){re.escape(str(ROOT.parent))}(?![\w.-])".encode())
    assert [str(p.relative_to(ROOT)) for p in files() if parent.search(p.read_bytes())] == []
