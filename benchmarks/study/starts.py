"""Networks that distillations begin with beside the teacher, in folders; see gdd_fast.distill.initialisation."""

from functools import partial
from pathlib import Path

from gdd_fast.bundled import teacher_path
from gdd_fast.config import Initialisation
from gdd_fast.distill.initialisation import start_from
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.files.save import save_network


def _write(initialisation: Initialisation, teacher: str, folder: Path, seed: int = 0) -> None:
    save_network(start_from(load_generator(teacher_path(teacher)), initialisation, 1, seed), folder)


WRITERS = {name: partial(_write, name) for name in ("random", "shuffled")}
