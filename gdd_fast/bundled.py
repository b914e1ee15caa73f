"""What comes with the package: a teacher, pretrained on the bundled data set of gdd_fast.data.demo."""

from pathlib import Path

from gdd_fast.config import DEMO

BUNDLED_TEACHER = Path(__file__).parent / "assets" / "teacher"


def teacher_path(name: str) -> Path:
    """The path of a teacher; `demo` is the bundled one."""
    return BUNDLED_TEACHER if name == DEMO else Path(name)
