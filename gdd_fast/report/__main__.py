"""Write a page about one or more training runs: `python -m gdd_fast.report RUN [RUN ...] --out report.html`.

One self-contained HTML file: sample sheets over time, curves, what was frozen, settings, runs side by side. Training
writes one into its run folder at every checkpoint; this command writes it again, or one for several runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gdd_fast.cli import command, parse, start
from gdd_fast.errors import require
from gdd_fast.files import check_destination


@dataclass(frozen=True)
class ReportConfig:
    """What the page shows."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders: the --run-dir of each training."""
    out: Path = Path("report.html")
    """The page to write."""

    def validate(self) -> None:
        """Raise `ConfigError` for the first option that cannot work. Reads no run."""
        require(len(self.runs) >= 1, "name at least one run folder")
        require(len({run.resolve() for run in self.runs}) == len(self.runs), "a run is given twice")
        require(self.out.suffix in (".html", ".htm"), f"--out must be an .html file, not {self.out}")
        check_destination(self.out)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(ReportConfig, name="report", args=arguments, description=__doc__)
    config.validate()
    with start(__name__):  # imported late: --help needs no torch
        from gdd_fast.report.report_page import write_page

    write_page(config.runs, config.out)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
