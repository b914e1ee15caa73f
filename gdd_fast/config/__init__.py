"""The settings of a distillation run: the sections and their flags, the presets of the paper, and the checks.

>>> config = override(preset("cifar10-uncond-gdd-i"), data="cifar10-32x32.zip", teacher="edm-cifar10.pkl")
>>> gdd_fast.distill.run.distill(config)
"""

from gdd_fast.config.ablation import AblationConfig, Initialisation
from gdd_fast.config.checks import CLASS_TABLES, check_seed, check_values, loggers, named_paths
from gdd_fast.config.recipes import AUTO, PRESETS, RECIPES, in_precision, override, preset, recipe_for
from gdd_fast.config.sections import (
    DEMO,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    Nonfinite,
    Precision,
    Reduction,
    RunConfig,
    StepEngine,
    TrainConfig,
    given,
)
from gdd_fast.config.stored import ADJUSTABLE, RESUMABLE, default_settings, differences, to_dict
