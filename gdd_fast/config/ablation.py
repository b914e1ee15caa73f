"""The settings of the ablations: alternatives to the paper's loss and initialisation. See docs/ablations.md."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gdd_fast.settings import Count, Limit, NotNegative, Settings

Initialisation = Literal["teacher", "random", "shuffled"]


@dataclass(frozen=True)
class AblationConfig(Settings):
    """Alternatives to the paper's loss and initialisation. The defaults are the paper's method, with none of these."""

    gan: Literal["on", "off"] = "on"
    """`off`: no GAN loss, and the discriminator is not trained; one of the losses below has to take its place."""
    init: Initialisation = "teacher"
    """What the generator starts from: the teacher's weights, `random` weights of the same shapes, or `shuffled`: the
    teacher's, with the channels permuted in every weight that is frozen (with --freeze 0: that GDD-I freezes)."""
    teacher_loss: Literal["none", "pd", "cd", "ctm"] = "none"
    """A loss against the teacher, added to the GAN loss: progressive distillation, consistency distillation or
    consistency trajectory."""
    teacher_loss_weight: NotNegative = 1.0
    """Weight of that loss relative to the GAN loss, both taken as means over images."""
    teacher_loss_distance: Literal["l2", "pseudo-huber", "lpips", "lpips-vgg"] = "l2"
    """The distance between the two images that this loss compares. LPIPS's weights: --feature-weights lpips=PATH."""
    teacher_loss_levels: Annotated[int, Limit(2)] = 18
    """How many noise levels cd and ctm use, from 0.002 to that of the one step."""
    target_ema: float = 0.0
    """Decay per iteration of the averaged generator that cd and ctm use as target; 0: the generator itself."""
    pd_steps: int = 8
    """Steps of the student in the first stage of pd, a power of two; each stage halves them, and the last has 1."""
    pd_stage_kimg: Annotated[float, Limit(0.001)] = 50.0
    """Thousands of images per stage of pd, except the last, which lasts to the end of the run."""
    ctm_solver_steps: Count = 3
    """Most solver steps of ctm's teacher, each from one noise level to the next."""
    ctm_dsm_weight: NotNegative = 1.0
    """Weight of ctm's denoising score matching within its loss."""
    frechet_loss: tuple[str, ...] = ()
    """Feature networks, named as in gdd_fast.evaluate; the loss adds the Frechet distance to the data in each."""
    frechet_weight: NotNegative = 1.0
    """Weight of the sum of these distances, each divided by the variance of the data's features."""
    frechet_population: Annotated[int, Limit(2)] = 50_000
    """How many of the latest generated images the statistics cover; must exceed the number of features."""
    frechet_refresh: Count = 1
    """Iterations between new statistics."""

    @property
    def adds_losses(self) -> bool:
        return self.teacher_loss != "none" or bool(self.frechet_loss)
