"""Files that are there whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from gdd_fast import convert, evaluate, files, prepare
from gdd_fast.errors import ConfigError
from gdd_fast.files import atomic_write, check_writable
from gdd_fast.metrics import make_reference


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "new" / "file.json") as temporary:
            temporary.write_text("text")
            assert not (tmp_path / "new" / "file.json").exists()
            assert temporary.suffix == ".json"
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file.json").read_text() == "text"
    assert stat.S_IMODE((tmp_path / "new" / "file.json").stat().st_mode) == 0o640
    assert os.listdir(tmp_path / "new") == ["file.json"]


def test_after_an_error_the_old_file_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_next_writer_removes_what_a_killed_one_has_left(tmp_path):
    path = tmp_path / "state[1].bin"
    path.write_text("old")
    (tmp_path / "other.bin").write_text("other")
    script = """
import os, signal, sys
from gdd_fast.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    temporary.with_name(".tmpAb1").write_text("of a writer's own, as safetensors makes them")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, path])
    assert killed.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 3
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["other.bin", "state[1].bin"]


def test_two_that_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]


def test_two_that_write_the_same_new_file_at_once(tmp_path):
    path = tmp_path / "file"
    kept = pytest.raises(FileExistsError, match="another process has written it meanwhile")
    with kept, atomic_write(path, new=True) as first:
        first.write_text("first")
        with atomic_write(path, new=True) as second:
            second.write_text("second")
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("command", ["prepare", "convert x.pt", "convert x.safetensors", "evaluate ref"])
def test_an_output_that_another_process_has_made_meanwhile_is_kept(inputs, tmp_path, capsys, monkeypatch, command):
    """It is refused when it is there at the start; what takes a while is between the two."""
    out = tmp_path / {"prepare": "x.zip", "evaluate ref": "x.npz"}.get(command, command.split()[-1])
    main, flags, place, name = {
        "prepare": (prepare.main, ["--source", inputs / "data.zip", "--dest", out], prepare, "open_source"),
        "evaluate ref": (
            evaluate.main,
            ["ref", "--data", inputs / "data.zip", "--features", "pixels", "--device", "cpu", "--out", out],
            make_reference,
            "load_data",
        ),
    }.get(command, (convert.main, [inputs / "teacher", out], convert, "_read"))
    read = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *given: out.write_text("theirs") and read(*given))
    with pytest.raises(SystemExit) as end:
        main([str(flag) for flag in flags])
    assert end.value.code == 2
    line = f"error: {out}: another process has written it meanwhile; choose another path, or mend this one"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert out.read_text() == "theirs" and os.listdir(tmp_path) == [out.name]


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """As some network file systems: files are written all the same, and nobody's are removed."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    test_two_that_write_the_same_file_at_once(tmp_path)


def test_check_writable_creates_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        check_writable(tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="link is a link to nothing"):
        check_writable(tmp_path / "link" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="permission"):
        check_writable(tmp_path / "run")
