"""The command line: help, wrong input, and directories that it must not touch."""

import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import headwise
import headwise_command
from headwise import cli
from headwise.analysis.records import Curve, ExpertLoads, ModelRecord, RunRecord, to_json
from headwise.cli import main
from headwise.errors import DivergedError, UnreadableError
from headwise.models import DiT, DiTConfig, TransNeXtConfig, TransNeXtForImageClassification
from headwise.recipes import RECIPES, recipe_run

pytestmark = pytest.mark.usefixtures("verbosity")


def test_installed_command_and_module_are_the_same():
    script = Path(sys.executable).with_name("headwise")
    for command in ([script], [sys.executable, "-m", "headwise"]):
        printed = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (printed.returncode, printed.stderr) == (0, "")
        assert printed.stdout == f"headwise {headwise.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage_lists_every_command(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["headwise", *arguments])
    headwise_command.main()
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in cli._COMMANDS)


def test_a_command_runs_with_the_garbage_collector_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["headwise", "--version"])
    monkeypatch.setattr(cli, "_run", lambda *_: print(gc.isenabled()))
    headwise_command.main()
    gc.unfreeze()
    assert capsys.readouterr().out == "True\n"


@pytest.mark.parametrize("arguments", [["train"], ["train", "--help"]])
def test_train_lists_every_recipe(capsys, arguments):
    main(arguments)
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_explains_every_field(capsys, recipe):
    with pytest.raises(SystemExit, match="0"):
        main(["train", recipe, "--help"])
    printed = capsys.readouterr().out
    for field in dataclasses.fields(recipe_run(recipe)):
        assert f"--{field.name.replace('_', '-')}" in printed
    assert "Optimizer steps." in " ".join(printed.split())
    assert "**" not in printed


@pytest.mark.parametrize(
    "command", ["convert", "tune", "write-text", "draw", "eval", "generate", "report"]
)
def test_help_of_a_command(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert f"usage: headwise {command}" in printed
    assert ("--schedule {small,paper}" in printed) == (command == "tune")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "lm"], "unknown command 'trian'; did you mean 'train'?"),
        (["samples"], "unknown command 'samples'; there are train, experiment, convert, tune"),
        (["train", "lms"], "unknown recipe 'lms'; did you mean 'lm'?"),
        (["train", "zzz"], "unknown recipe 'zzz'; there are lm"),
        (["train", "lm", "--stepz", "3"], "--steps"),
        (["tune", "a", "-o", "b", "--routed.steps", "few"], "routed.steps is 'few'; it must be an"),
        (["convert", "a", "-o", "b", "--layers", "1", "b"], "layers is '1', 'b'; it must be a"),
        (["train", "lm", "--models", "mohh"], "mohh"),
        (["train", "lm", "--shared-heads", "9"], "headwise: shared_heads is 9; it must"),
        (
            ["convert", "a", "-o", "b", "--active", "1.5"],
            "headwise: active is 1.5; it must be an int of at least 1 or a number above 0",
        ),
        (["tune", "a", "-o", "b", "--schedule", "papr"], "unknown schedule 'papr'; did you mean"),
        (["tune", "a", "-o", "b", "--distill", "-1"], "headwise: distill is -1.0; it must"),
        (
            ["tune", "a", "-o", "b", "--routed.learning-rate", "-1"],
            "headwise: routed.learning_rate is -1.0; it must be above 0",
        ),
        (["tune", "no/none", "-o", "b"], "no/none cannot be loaded: there is no"),
        (["train", "lm", "--mlp-dim", "80"], "expert_dim is 80"),
        (["train", "lm", "--data", "/no/such"], "data is '/no/such'; there is no such file"),
        (["generate", "/no/such", "--prompt", "x"], "/no/such holds no model"),
        (["report", "/no/such"], "/no/such holds no finished run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_with_status_2_and_says_why(fails, arguments, message):
    assert message in fails(2, *arguments)


def test_a_file_is_no_directory_of_a_model(fails):
    new = f"{__file__}.new"
    for command in (("generate", "--prompt", "x"), ("convert", "-o", new), ("tune", "-o", new)):
        said = fails(2, command[0], __file__, *command[1:])
        assert said == f"headwise: {__file__} is a file; give the directory of a model"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "no/such/", "--prompt", "x"],
        ["draw", "no/such", "-o", "x.png"],
        ["report", "no/such"],
    ],
)
def test_a_missing_directory_is_refused_before_torch_is_loaded(fails, arguments):
    script = (
        "import sys, headwise_command\n"
        "try: headwise_command.main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.strip() == fails(2, *arguments)


def test_a_missing_directory_has_a_traceback_with_debug(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["headwise", "report", "no/such", "--debug"])
    with pytest.raises(SystemExit, match="2"):
        headwise_command.main()
    assert "Traceback" in capsys.readouterr().err


def test_a_directory_without_a_page_is_named_by_what_it_is(fails, tmp_path):
    for file, what in (
        ("config.json", "it is a model's: give the directory of the run"),
        ("run.json", "the run in it has not ended"),
        ("recovery.png", "it is of `headwise tune`, which draws no page"),
    ):
        (tmp_path / file).touch()
        assert f"no finished run (no record.json); {what}" in fails(2, "report", tmp_path)


def test_broken_model_is_named(fails, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = fails(2, "generate", tmp_path, "--prompt", "x")
    assert f"{tmp_path} cannot be loaded: " in said


def test_what_is_no_language_model_is_named_by_what_it_is(fails, tmp_path):
    TransNeXtForImageClassification(TransNeXtConfig.preset("test")).save_pretrained(tmp_path / "a")
    DiT(DiTConfig.preset("dit-test")).save_pretrained(tmp_path / "b")
    what = {
        "a": "an image classifier (model_type 'headwise_transnext')",
        "b": "a DiT (model_type 'headwise_dit')",
    }
    use = {"a": "`headwise eval --images` scores it", "b": "`headwise draw` draws with it"}
    for name in "ab":
        path, new = tmp_path / name, tmp_path / "new.parquet"
        said = f"headwise: {path} holds {what[name]}, not a language model; {use[name]}"
        assert fails(2, "generate", path, "--prompt", "x") == said
        assert fails(2, "write-text", path, "-o", new) == said
        assert fails(2, "tune", path, "-o", new) == said
        assert not new.exists()


def test_output_that_nobody_reads_ends_the_command_silently():
    command = [sys.executable, "-m", "headwise", "bench", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_broken_record_is_named(fails, tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    assert str(tmp_path) in fails(2, "report", tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"steps": [10]', '"steps": "x"'), ('"losses": [1.5]', '"losses": [null]'),
     ('"seed": 0', '"seed": true'), ("0.5]]", "-7]]")],
)  # fmt: skip
def test_a_record_with_wrong_values_is_named_and_the_page_stays(fails, tmp_path, old, new):
    loads = ExpertLoads([1], {"code": [[0.5, 0.5]]}, 1, {"code": [3]}, {"code": [None]})
    curve = Curve([10], [1.5])
    record = RunRecord("t", {}, [], [], [], [ModelRecord("a", "A", 0, curve, curve, None, loads)])
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "record.json").write_text(to_json(record).replace(old, new))
    said = fails(2, "report", tmp_path)
    assert said.startswith(f"headwise: {tmp_path}/record.json cannot be read: ")
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_output_that_is_a_file_stays(fails, tmp_path, flags):
    text = "".join(f"line {i}\n" for i in range(20))
    (tmp_path / "text.txt").write_text(text)
    output = ("--output", tmp_path / "text.txt", "--data", tmp_path / "text.txt")
    message = fails(2, "train", "lm", *output, *flags)
    assert f"output is {tmp_path / 'text.txt'}, a file" in message
    assert (tmp_path / "text.txt").read_text() == text


def test_tracker_that_is_not_installed_is_refused_before_anything_is_written(fails, tmp_path):
    message = fails(2, "train", "lm", "--report-to", "tensorbord", "--output", tmp_path / "run")
    assert "report_to names 'tensorbord'" in message
    assert "tensorboard" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train lm --stepz 3", "Unrecognized options: --stepz, 3; Perhaps you meant: --steps INT"),
        ("train lm --steps few", "steps is 'few'; it must be an int"),
        ("tune", "Missing from headwise tune: STR -o PATH, --output PATH"),
        ("generate", "Missing from headwise generate: PATH --prompt STR"),
        ("train lm --shared-heads 9", "shared_heads is 9; it must lie in 0..8 (num_heads)"),
    ],
)
def test_what_tyro_refuses_is_one_line_as_all_else(capsys, arguments, line):
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert capsys.readouterr().err == f"headwise: {line}\n"


def raising(error: BaseException) -> Callable[[], None]:
    def env() -> None:
        raise error

    return env


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (TypeError("a is\nno b"), 70, "this is a bug in headwise: TypeError: a is no b; the same "
         "command with --debug shows where"),
        (RuntimeError("boom"), 70, "this is a bug in headwise: RuntimeError: boom; the same "
         "command with --debug shows where"),
        (UnreadableError("x cannot be read"), 2, "x cannot be read"),
        (DivergedError("the loss is nan"), 1, "the loss is nan"),
        (MemoryError(), 1, "there is not enough memory (MemoryError)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 1,
         "there is not enough memory (DefaultCPUAllocator: can't allocate memory: 8 bytes)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_failure_is_one_line_and_a_traceback_only_with_debug(
    capsys, monkeypatch, error, status, line
):
    monkeypatch.setattr("headwise.commands.env.env", raising(error))
    with pytest.raises(SystemExit) as end:
        main(["env"])
    assert (end.value.code, capsys.readouterr().err) == (status, f"headwise: {line}\n")
    for arguments in (["--debug", "env"], ["env", "--debug"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        *above, last = capsys.readouterr().err.splitlines()
        assert (end.value.code, last) == (status, f"headwise: {line}")
        assert "Traceback" in above[0]
        assert type(error).__name__ in "".join(above)


@pytest.mark.parametrize("command", ["train", "experiment", "tune", "convert", "compile", "bench"])
def test_ctrl_c_advises_resume_where_there_is_one(capsys, monkeypatch, command):
    def interrupt(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"headwise.commands.{command}.main", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main([command])
    said = capsys.readouterr().err
    assert ("--resume" in said) == (command in ("train", "experiment", "tune"))
    assert said.startswith("headwise: interrupted")


def test_ctrl_c_while_libraries_are_loaded_is_one_line():
    # A shell lets what runs in the background ignore Ctrl-C, the tests, too.
    script = (
        "import signal, sys, headwise_command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'transformers': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "headwise_command.main()"
    )
    command = [sys.executable, "-c", script, "env"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "headwise: interrupted\n"


def test_arguments_that_are_no_text_are_refused(fails):
    message = fails(2, "generate", "x", "--prompt", "\udcff")
    assert message == "headwise: argument 4 is '\\udcff', which is no UTF-8 text"


def test_a_directory_with_any_name_is_refused_before_torch_is_loaded():
    for name in ("a\nb", "x" * 5000):
        script = "import headwise_command; headwise_command.main()"
        command = [sys.executable, "-c", script, "report", name]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode in (1, 2)
        assert ended.stderr.count("\n") == 1
        assert ended.stderr.startswith("headwise: ")
