"""Which engine takes the steps of a distillation, by its settings and the device."""

import torch

from gdd_fast.config import StepEngine, TrainConfig
from gdd_fast.training.batches import split_batch
from gdd_fast.training.captured_steps import choose_step_engine


def step_engine(config: TrainConfig, device: torch.device, processes: int) -> StepEngine:
    """The engine of a run on `device` with this number of processes. Raises as `choose_step_engine`."""
    run, loss, ablation = config.run, config.loss, config.ablation
    local_batch, micro_batch = split_batch(run.batch, run.batch_gpu, processes)
    fixed = config.has_fixed_steps
    apart = fixed and ablation.gan == "on" and loss.reuse_fakes and micro_batch == local_batch
    return choose_step_engine(run.engine, device, processes, fixed=fixed, apart=apart)
