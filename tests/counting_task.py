"""A task for the training loop that only counts."""

import json

import torch

from gdd_fast.training.output import Averages

CONFIG = {"batch": 10, "seed": 0}


class Counting:
    """Adds up the numbers of its iterations."""

    batch = 10
    remedy = "a lower --x"

    def __init__(self, at=None, contents=None):
        self.contents = contents or {"data": "a"}
        self.averages = Averages()
        self.sum = torch.zeros(())
        self.at = at or {}
        self.ticks, self.exports, self.closed = [], 0, 0

    def iteration(self, images):
        self.sum += images
        self.averages.add("loss_x", torch.tensor(float(images)))
        self.at.get(images, lambda: None)()

    def tick(self, images):
        self.ticks.append(images)
        return {"extra": 1.0}

    def state(self):
        return {"x": {"sum": self.sum}}, {}

    def restore(self, saved):
        self.sum.copy_(saved.section("x")["sum"])

    def export(self, run_dir, sections):
        self.exports += 1
        (run_dir / "sum.txt").write_text(str(float(sections["x"]["sum"])))

    def exported(self, run_dir):
        return (run_dir / "sum.txt").exists() and (run_dir / "sum.txt").read_text() == str(float(self.sum))

    def close(self):
        self.closed += 1


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
