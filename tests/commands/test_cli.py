"""Command lines: flags from the fields of a dataclass, and the help of every command."""

import errno
import importlib
import io
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gdd_fast.cli import command, parse, pop_option
from gdd_fast.config.checks import named_paths
from gdd_fast.errors import ConfigError, GddFastError, WeightsError
from gdd_fast.train import read

COMMANDS = ("train", "sample", "evaluate", "pretrain", "prepare", "convert", "export", "info")


@dataclass(frozen=True)
class Options:
    folder: Path = Path()
    """Where."""
    some_number: int = 3
    """How many."""


def test_flags_are_field_names():
    assert parse(Options, name="x", args=[]) == Options()
    assert parse(Options, name="x", args=["--some-number", "4"]) == Options(some_number=4)
    assert parse(Options, Options(some_number=5), name="x", args=[]) == Options(some_number=5)


def test_a_home_folder_behind_an_equals_sign(monkeypatch):
    """A shell leaves the ~ of `--folder=~/runs` and of `--backbone-weights vgg16=~/file` as it is."""
    monkeypatch.setenv("HOME", "/home/of")
    assert parse(Options, name="x", args=["--folder=~/runs=1"]).folder == Path("/home/of/runs=1")
    assert pop_option(["--name=~", "a=~/b"], "name", "") == ("/home/of", ["a=~/b"])
    assert named_paths("--weights", ["vgg16=~/file"]) == {"vgg16": Path("/home/of/file")}


@pytest.mark.parametrize("arguments", [["--other", "4"], ["--some-number", "four"], ["4"]])
def test_what_is_not_understood_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Options, name="x", args=arguments)
    assert end.value.code == 2 and capsys.readouterr().err


def test_pop_option():
    assert pop_option(["--a", "1", "--name", "x", "--b"], "name", "y") == ("x", ["--a", "1", "--b"])
    assert pop_option(["--name=x", "--name", "z"], "name", "y") == ("z", [])
    assert pop_option(["--names", "x"], "name", "y") == ("y", ["--names", "x"])
    with pytest.raises(ConfigError, match="needs a value"):
        pop_option(["--name"], "name", "y")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"gdd_fast.{name}").main(["--help"])
    assert end.value.code == 0
    assert f"python -m gdd_fast.{name}" in capsys.readouterr().out


def test_train_starts_from_the_preset():
    asked = read(["--preset", "ffhq-64-gdd", "--data", "d", "--teacher", "t", "--batch", "8", "--dry-run"])
    assert asked.dry_run and asked.config.preset == "ffhq-64-gdd"
    assert (asked.config.run.batch, asked.config.generator.g_lr, asked.config.generator.freeze) == (8, 2e-5, 0)
    assert read([]).config.preset == "demo" and not read([]).dry_run


def test_flags_of_train_need_no_section(capsys):
    names = ["--backbones", "vgg16", "vgg16_bn", "--backbone-weights", "vgg16=a", "vgg16_bn=b", "--no-cond"]
    options = read(names).config.discriminator
    assert options.backbones == ("vgg16", "vgg16_bn") and len(options.backbone_weights) == 2
    for wrong in (["--run.batch", "8"], ["--g-precision", "fp16"], ["--batches", "8"]):
        with pytest.raises(SystemExit) as end:
            read(wrong)
        assert end.value.code == 2


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (GddFastError("no such thing"), 2, "error: no such thing\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: not enough memory: use smaller batches\n"),
        (
            torch.OutOfMemoryError("20 GiB\nmore"),
            2,
            "error: not enough memory (20 GiB): use smaller batches\n",
        ),
        (
            RuntimeError("can't allocate memory: 9 B"),
            2,
            "error: not enough memory (can't allocate memory: 9 B)",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "error: not enough memory ([Errno 12] "),
        (RuntimeError("can't start new thread"), 2, "error: the system cannot start more threads: "),
    ],
)
def test_how_a_command_fails(error, status, text, capsys):
    @command
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status and capsys.readouterr().err.startswith(text)


def test_a_file_is_not_called_damaged_for_want_of_memory(capsys):
    @command
    def main():
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        except RuntimeError:
            raise WeightsError("x.pt: not a file of plain tensors") from None

    with pytest.raises(SystemExit) as end:
        main()
    line = "error: not enough memory (x.pt: not a file of plain tensors): use smaller batches\n"
    assert end.value.code == 2 and capsys.readouterr().err == line


OTHERS = [
    RuntimeError("could not create a primitive"),
    SystemError("error return without exception set"),
    ImportError(),
]


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_keep_their_traceback_unless_memory_is_used_up(error, monkeypatch, capsys):
    @command
    def main():
        raise error

    for limit in (-1, 1 << 62):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        with pytest.raises(type(error)) as raised:
            main()
        assert raised.value is error
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: not enough memory")


PROGRAM = """
import sys
from gdd_fast.cli import command
@command
def main():
    for line in range(100):
        print("progress", line, file=sys.stderr)
    open(sys.argv[1], "w").close()
    print("done")
main()
"""


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "2> >(exec head -c 1 >/dev/null)"])
def test_work_goes_on_where_nothing_can_be_said(tmp_path, redirection):
    """Closed streams, a full disk, and a reader of stderr that has died, as `2>&1 | tee` does of the same Ctrl-C."""
    script = f'"{sys.executable}" -c "$1" "$2" {redirection}'
    done = subprocess.run(["bash", "-c", script, "bash", PROGRAM, str(tmp_path / "saved")], timeout=60)
    assert (tmp_path / "saved").exists() and done.returncode == 0


def test_a_name_that_the_terminal_cannot_show_is_shown_all_the_same(monkeypatch):
    """Work that is done must not end in a traceback over a letter of its folder's name."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    command(lambda: print("runs/\u00fc", os.fsdecode(b"\xfc")))()
    assert buffer.getvalue() == rb"runs/\xfc \udcfc" + b"\n" and stream.errors == "strict"
