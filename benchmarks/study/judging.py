"""What the judges say of teacher and students: distances to held-out real images, by networks of several kinds."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.folders import Folders, write_json
from benchmarks.study.training import Budget
from gdd_fast.bundled import teacher_path
from gdd_fast.data import load_data
from gdd_fast.device import full_float32, pick_device
from gdd_fast.metrics.features import build_extractor
from gdd_fast.metrics.frechet import frechet_distance
from gdd_fast.metrics.kid import kernel_distance
from gdd_fast.metrics.neighbours import precision_recall
from gdd_fast.metrics.population import Needs, Population, dataset_populations, generator_populations
from gdd_fast.models.files.load import load_generator
from gdd_fast.sampling.generate import SamplerConfig

FLOOR, TEACHER, UNTRAINED = "floor", "teacher", "untrained"
KERNEL_SUBSETS = 20  # of 1,000 images each; their mean is the estimate
_BATCH = 64


@dataclass(frozen=True)
class Subject:
    """Images to judge: of a network under a sampler, or real ones."""

    what: str
    """A run's name, or one of the constants above."""
    trained: int
    """Images it was trained on, 0 for what is not a run."""
    net: str | None
    sampler: SamplerConfig | None
    seed_set: int

    def path(self, folders: Folders) -> Path:
        return folders.judged(self.what, self.trained, sampler_name(self.sampler), self.seed_set)


def sampler_name(sampler: SamplerConfig | None) -> str:
    if sampler is None:
        return "real"
    return "one-step" if sampler.sampler == "one-step" else f"heun{sampler.steps}"


def subjects(folders: Folders, only: Sequence[str]) -> Iterator[Subject]:
    """What there is to judge, what matters most first. `only` names runs; none is all, and the teacher."""
    study, one_step = folders.study, SamplerConfig()
    heun = [SamplerConfig(sampler="heun", steps=steps) for steps in study.teacher_steps]
    runs = [run for run in study.all_runs() if not only or run.name in only]
    if not only:
        yield Subject(FLOOR, 0, None, None, 0)
        yield Subject(UNTRAINED, 0, folders.teacher, one_step, 0)
        yield Subject(TEACHER, 0, folders.teacher, heun[0], 0)
    snapshots = [(run, milestone) for run in runs for milestone in folders.reached(run)]
    for run, milestone in sorted(snapshots, key=lambda pair: pair[1]):
        yield Subject(run.name, milestone, str(folders.snapshot(run, milestone)), one_step, 0)
    for sampler in [] if only else heun[1:]:
        yield Subject(TEACHER, 0, folders.teacher, sampler, 0)
    for seed_set in range(1, study.seed_sets):
        if not only:
            yield Subject(TEACHER, 0, folders.teacher, heun[0], seed_set)
        for run in runs:
            for milestone in folders.reached(run)[-1:]:
                yield Subject(run.name, milestone, str(folders.snapshot(run, milestone)), one_step, seed_set)


@full_float32()
def judge(folders: Folders, only: Sequence[str], budget: Budget) -> None:
    """Judge everything that is trained and not judged yet, one file of figures each."""
    waiting = [subject for subject in subjects(folders, only) if not subject.path(folders).exists()]
    if not waiting:
        return
    court = Court(folders, budget)
    for subject in waiting:
        budget.check()
        write_json(subject.path(folders), court.judge(subject))


class Court:
    """The judges and what they see in the real images."""

    def __init__(self, folders: Folders, budget: Budget) -> None:
        self.folders, self.budget = folders, budget
        self.device = pick_device("auto")
        self.judges = [build_extractor(name, device=self.device) for name in folders.study.features]
        # the kernel distance, precision and recall are by the first two
        self.needs = [Needs(rows=index < 2) for index in range(len(self.judges))]
        self.options = {"batch": _BATCH, "progress": lambda _: budget.check()}
        test = load_data(folders.data("test"))
        self.real = dataset_populations(test, self.judges, self.needs, **self.options)

    def judge(self, subject: Subject) -> dict[str, Any]:
        """Distances of the subject's images by every judge; precision and recall by the first two."""
        begun = time.process_time()
        populations = self._populations(subject)
        generation_and_features = time.process_time() - begun
        found: dict[str, Any] = {"images": populations[0].count, "frechet": {}, "kernel": {}, "precision_recall": {}}
        for judge, ours, real in zip(self.judges, populations, self.real, strict=True):
            found["frechet"][judge.name] = frechet_distance(ours.statistics, real.statistics)
            if ours.rows is not None:
                self.budget.check()
                found["kernel"][judge.name] = kernel_distance(ours.rows, real.rows, subsets=KERNEL_SUBSETS)
                found["precision_recall"][judge.name] = precision_recall(ours.rows, real.rows)
        return {**found, "cpu_s": round(generation_and_features, 1)}

    def _populations(self, subject: Subject) -> list[Population]:
        """The subject's images as the judges see them."""
        count = self.folders.study.images
        if subject.net is None:
            train = load_data(self.folders.data("train"))
            return dataset_populations(train, self.judges, self.needs, max_images=count, **self.options)
        net = load_generator(teacher_path(subject.net), self.device, "float32").to(memory_format=torch.channels_last)
        seeds = range(subject.seed_set * count, (subject.seed_set + 1) * count)
        return generator_populations(net, self.judges, seeds, subject.sampler, self.needs, **self.options)
