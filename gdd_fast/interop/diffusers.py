"""One-step generators as a pipeline of diffusers; the only file that needs that library.

    pipe = OneStepPipeline.from_generator("run")                      a network, or what gdd_fast.load_generator takes
    images = pipe(batch_size=4, class_labels=3, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained("folder"); pipe = OneStepPipeline.from_pretrained("folder")

`pipe.to("cuda")`, `pipe.push_to_hub(...)` and the rest work as in diffusers. A stored pipeline loads only after this
module is imported: diffusers does not import a module because a file names it.
"""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gdd_fast.engine.engines import Finish
from gdd_fast.engine.one_step import OneStepGenerator, check_finite
from gdd_fast.errors import ConfigError, InputError
from gdd_fast.interop import hub
from gdd_fast.interop.model_card import Origin, model_card, origin_of_run
from gdd_fast.layers.silent import silent
from gdd_fast.models.files.diffusers_folder import INDEX
from gdd_fast.models.files.load import PRECONDS, load_generator
from gdd_fast.models.preconditioned import Preconditioned

OutputType = Literal["pil", "np", "pt"]


class GeneratorModel(ModelMixin, ConfigMixin):
    """A network of gdd_fast as a diffusers component: stored with its arguments, called like the network.

    Args:
        precond: "edm", "gdd" or "unet2d".
        init: the network's arguments, as in the config.json of a network folder.
    """

    @register_to_config
    def __init__(self, precond: str = "gdd", init: dict[str, Any] | None = None) -> None:
        super().__init__()
        if precond not in PRECONDS or init is None:
            raise ConfigError(f"precond must be one of {', '.join(PRECONDS)} and init the network's arguments")
        self.network = PRECONDS[precond](**init)

    @classmethod
    def of(cls, network: Preconditioned) -> "GeneratorModel":
        """A component around `network` itself, not a copy. Raises ConfigError if it is not a network of gdd_fast."""
        precond = next((name for name, kind in PRECONDS.items() if type(network) is kind), None)
        if precond is None:
            raise ConfigError(f"a pipeline takes a network of gdd_fast, not {type(network).__name__}")
        with torch.device("meta"):
            model = cls(precond=precond, init=network.init_config())
        model.network = network
        return model.train(network.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "GeneratorModel":
        """As diffusers', with weights in `dtype` (or `torch_dtype`, diffusers' other name for it).

        They are read as stored and cast by the network, which leaves its embedding's frequencies in float32.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **options)
        dtype = torch_dtype if dtype is None else dtype
        if dtype is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).to(dtype)  # a tuple if output_loading_info=True
        return loaded

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        return self.network(x, sigma, class_labels)


class OneStepPipeline(DiffusionPipeline):
    """Generates images from noise in one evaluation of `model`."""

    model_cpu_offload_seq = "model"

    def __init__(self, model: GeneratorModel) -> None:
        super().__init__()
        self.register_modules(model=model)
        self._engine: tuple[Any, list[Tensor], OneStepGenerator] | None = None
        self.origin = Origin()

    @classmethod
    def from_generator(cls, generator: str | Path | Preconditioned | OneStepGenerator) -> "OneStepPipeline":
        """A pipeline from a network, or from anything `gdd_fast.load_generator` takes."""
        network = load_generator(generator) if isinstance(generator, str | Path) else generator
        network = network.network if isinstance(network, OneStepGenerator) else network
        pipe = cls(GeneratorModel.of(network))
        if isinstance(generator, str | Path):
            pipe.origin = origin_of_run(Path(generator))
        return pipe

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "OneStepPipeline":
        """As diffusers', from a folder or repository that holds a pipeline; or from the folder of a training run."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / INDEX).is_file():
            pipe = cls.from_generator(folder)
            dtype = options.get("dtype", options.get("torch_dtype"))
            return pipe if dtype is None else pipe.to(dtype)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        teacher_license: str | None = None,
        data_license: str | None = None,
        commit_message: str = "Upload OneStepPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool | None = None,
        **save_options: Any,
    ) -> str:
        """As diffusers', with a card that names teacher, data, metrics and the licence of each.

        The first three are known of a pipeline made from a run's folder; licences are as in `hub.save_pretrained`.
        """
        licenses = {"license": license, "teacher_license": teacher_license, "data_license": data_license}
        loading = (
            "import gdd_fast.interop.diffusers\nfrom diffusers import DiffusionPipeline\n\n"
            f'images = DiffusionPipeline.from_pretrained("{repo_id}")(batch_size=4).images'
        )
        card = model_card(repo_id, hub.form_of(self.model.network), loading, self.origin.licensed(**licenses))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            Path(folder, "README.md").write_text(card)
            options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
            return hub.upload(Path(folder), repo_id, allow_patterns=None, **options)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: how many.
            class_labels: one class for all, one per image, or float (batch_size, label_dim); None draws classes.
            generator: one for all, or one per image, which makes images independent of the batch.
            output_type: "pil", "np" (float32 (N, H, W, C) in [0, 1]) or "pt" (float32 (N, C, H, W) in [0, 1]).
            return_dict: False for a tuple.

        Raises:
            InputError: arguments that do not fit together or do not fit the network.
            WeightsError: the network returns values that are not finite.
        """
        if output_type not in get_args(OutputType):
            raise InputError(f"output_type must be one of {', '.join(get_args(OutputType))}, not {output_type!r}")
        engine = self.engine()
        if generator is None or isinstance(generator, torch.Generator):
            latents, drawn = engine.draw(batch_size, generator=generator)
        else:
            if len(generator) != batch_size:
                raise InputError(f"{batch_size} images need {batch_size} generators, or one, not {len(generator)}")
            rows = [engine.draw(1, generator=one) for one in generator]
            latents = torch.cat([row for row, _ in rows])
            drawn = torch.cat([label for _, label in rows]) if engine.label_dim else None
        own = class_labels is None
        images = check_finite(engine.run(latents, drawn if own else class_labels, check_classes=not own))
        result: Any = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            result = result.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            levels = (result * 255).round().astype("uint8")
            result = [Image.fromarray(level.squeeze(-1) if level.shape[-1] == 1 else level) for level in levels]
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def engine(self) -> OneStepGenerator:
        """The network as a fast generator, remade if it has moved, changed its dtype or got other weights.

        No flag reliably shows that a weight has changed (fused optimizers and diffusers' EMAModel leave no trace), so
        the weights are compared with a copy of those that were folded, which doubles their memory. If a layer has
        hooks, a replaced forward or parameters of another class, as for offloading, the model itself is called.
        """
        network, device = self.model.network, self._execution_device
        if not all(silent(module) for module in self.model.modules()):
            self._engine = None
            return _Unfolded(self.model, device)
        stored = self.model.dtype  # `to` and `from_pretrained(torch_dtype=...)` leave their choice in the weights
        dtype = network.dtype if stored == torch.float32 else stored
        made_of = (network, device, dtype)
        weights = [t.detach() for t in itertools.chain(network.parameters(), network.buffers())]
        if self._engine is None or self._engine[0] != made_of or not _equal(weights, self._engine[1]):
            self._engine = None  # frees its memory before the next is made
            engine = OneStepGenerator.from_network(network, device=device, dtype=dtype)
            self._engine = made_of, [t.clone() for t in weights], engine
        return self._engine[2]


class _Unfolded(OneStepGenerator):
    """A pipeline's model called unfolded, with all its hooks."""

    def __init__(self, model: GeneratorModel, device: torch.device) -> None:
        network = model.network
        self.model, self.network, self.device, self.dtype = model, network, device, network.dtype
        self.img_resolution, self.img_channels = network.img_resolution, network.img_channels
        self.label_dim = network.label_dim

    def _evaluate(self, latents: Tensor, labels: Tensor | None, finish: Finish | None = None) -> Any:
        if labels is not None and not labels.is_floating_point():
            labels = F.one_hot(labels, self.label_dim).float()
        sigma = self.model.network.sigma_init
        images = self.model(latents * sigma, sigma, labels)
        return images if finish is None else finish(images)


def _equal(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Whether all have the same values, dtypes and device; waits for the device once."""
    kind = lambda t: (t.shape, t.dtype, t.device)
    if [kind(t) for t in weights] != [kind(t) for t in copies]:
        return False
    if all(t.device.type == "cpu" for t in weights):
        return all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
    different = [(a != b).any() for a, b in zip(weights, copies, strict=True)]
    return not torch.stack(different).any().item()
