"""The settings of the ablations: what the paper's loss and its start are compared with. docs/ablations.md."""

from dataclasses import dataclass
from typing import Annotated, Literal

from gdd_fast.settings import Count, Limit, NotNegative, Settings

Initialisation = Literal["teacher", "random", "shuffled"]


@dataclass(frozen=True)
class AblationConfig(Settings):
    """What the paper's loss and its start are compared with. The defaults are the paper's method, without any of it."""

    gan: Literal["on", "off"] = "on"
    """`off`: no GAN loss and no training of the discriminator; one of the losses below has to take its place."""
    init: Initialisation = "teacher"
    """What the generator starts from: the teacher's weights, `random` ones of its form, or `shuffled`: the teacher's,
    with the channels in another order in every weight that is frozen (with --freeze 0: in every one that GDD-I
    freezes)."""
    teacher_loss: Literal["none", "pd", "cd", "ctm"] = "none"
    """A loss against the teacher, added to the GAN loss: progressive distillation, consistency distillation or
    consistency trajectory."""
    teacher_loss_weight: NotNegative = 1.0
    """Weight of that loss, as a mean over images, beside the GAN loss as a mean over images."""
    teacher_loss_distance: Literal["l2", "pseudo-huber", "lpips", "lpips-vgg"] = "l2"
    """The distance between the two images that it compares. LPIPS's weights come from --feature-weights lpips=PATH."""
    teacher_loss_levels: Annotated[int, Limit(2)] = 18
    """Noise levels of cd and ctm, from 0.002 to the one of the one step."""
    target_ema: float = 0.0
    """Decay per iteration of the averaged generator that is the target of cd and ctm; 0: the generator itself."""
    pd_steps: int = 8
    """Steps of the student in the first stage of pd, a power of two; each stage halves them, the last has 1."""
    pd_stage_kimg: Annotated[float, Limit(0.001)] = 50.0
    """Thousands of images of each stage of pd but the last, which lasts to the end of the run."""
    ctm_solver_steps: Count = 3
    """Steps that ctm's teacher solves at most, from one of its noise levels to the next."""
    ctm_dsm_weight: NotNegative = 1.0
    """Weight of ctm's denoising score matching within its loss."""
    frechet_loss: tuple[str, ...] = ()
    """Feature networks, as gdd_fast.evaluate names them, whose Frechet distance to the data is added to the loss."""
    frechet_weight: NotNegative = 1.0
    """Weight of the sum of these distances, each divided by the variance of the data's features."""
    frechet_population: Annotated[int, Limit(2)] = 50_000
    """How many of the latest generated images the statistics are taken from; more than there are features."""
    frechet_refresh: Count = 1
    """Iterations between new statistics."""

    @property
    def adds_losses(self) -> bool:
        return self.teacher_loss != "none" or bool(self.frechet_loss)
