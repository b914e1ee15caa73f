"""Losses that compare the generator with its teacher image by image: the baselines of GDD's paper."""

from gdd_fast.distill.teacher_losses.consistency_distillation import ConsistencyLoss
from gdd_fast.distill.teacher_losses.progressive import ProgressiveLoss
from gdd_fast.distill.teacher_losses.teacher_loss import Setup, TeacherLoss
from gdd_fast.distill.teacher_losses.trajectory import TrajectoryLoss

__all__ = ["TEACHER_LOSSES", "Setup", "TeacherLoss"]

TEACHER_LOSSES: dict[str, type[TeacherLoss]] = {
    "pd": ProgressiveLoss,
    "cd": ConsistencyLoss,
    "ctm": TrajectoryLoss,
}
