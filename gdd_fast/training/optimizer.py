"""Adam with a finite check and the moving average in one pass, and the guard that counts skipped steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.config import Nonfinite
from gdd_fast.errors import ConfigError, DivergedError
from gdd_fast.ops.adam_ema import Group, adam_ema_, check_options
from gdd_fast.ranks import World
from gdd_fast.training.exchange import GradientExchange
from gdd_fast.training.sharding import is_sharded, laid_out_as, own_part

_MISSING = ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay")
"""Options of torch.optim.Adam that this one lacks."""


class AdamEma(torch.optim.Optimizer):
    """torch.optim.Adam that skips every step with a non-finite gradient as a whole, and updates averages on the way.

    `state_dict()` is that of torch.optim.Adam; each loads the other's. The counts, the learning rates and the averages'
    weight are tensors on the parameters' device; nothing waits for the device. PyTorch's learning-rate schedulers,
    copy.deepcopy and pickle work as with its own optimizers; a copy keeps the counts, and has averages of its own
    unless it is copied together with the network that they belong to.

    With parameters sharded by FSDP2, each process steps its shards, and all take or skip a step together: every process
    calls `step`. Moments are sharded alike, in `state_dict()` too; whole ones can be loaded.

    Args:
        params: float32 parameters on one device, or groups of them with learning rates and options of their own.
        lr: a number, or a scalar tensor, which every step reads again: inside a CUDA graph, one on the device.
        betas, eps, weight_decay: as for torch.optim.Adam.
        averages: for all trained parameters, a tensor like each, moved towards it by `average_weight` in every step.
        backend: see gdd_fast.backend.

    Raises:
        ConfigError: parameters that gain or lose gradients between steps, or are added after the first step, as check
        and count cover all parameters together. A state of an Adam with options that this one lacks.
        InputError: options out of range, or averages that are not like their parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        averages: Mapping[nn.Parameter, Tensor] | None = None,
        backend: Backend = "auto",
    ) -> None:
        # the other keys are those that torch.optim.Adam expects when it loads this state
        flags = dict.fromkeys((*_MISSING, "capturable"), False)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": None, "fused": None}
        super().__init__(params, defaults | flags)
        self.backend = backend
        self._averages = dict(averages or {})
        device = self.param_groups[0]["params"][0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps skipped since this object was made, int64 (); without those that `step` was told to count elsewhere."""
        self.average_weight = torch.zeros((), dtype=torch.float64, device=device)
        """float64 (): how far the averages move, from 0, not at all, to 1, all the way."""
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._rates = torch.zeros(0, dtype=torch.float64, device=device)
        self._rates_filled: list[float | None] = []

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles: torch.optim.Optimizer's has only what every optimizer has."""
        own = ("backend", "skipped", "average_weight", "_averages", "_step", "_rates", "_rates_filled")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only before the first step, as all parameters share a count. Missing options are the optimizer's."""
        if self.state:
            raise ConfigError("AdamEma counts the steps of all parameters together: add groups before the first step")
        options = {**self.defaults, **param_group}
        check_options(options["betas"], options["eps"], options["weight_decay"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, skipped: Tensor | None = None) -> Any:
        """Apply the gradients if all are finite; otherwise add one to `skipped`, by default this object's own.

        A change of a group's `lr`, or inside it if it is a tensor, takes effect at the next step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.read_rates()
        trained = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        params = [p for group in trained for p in group]
        if not params:
            return loss
        self._start(params)
        states = [self.state[p] for p in params]
        averaged = [p in self._averages for p in params]
        if any(averaged) and not all(averaged):
            raise ConfigError("AdamEma averages all parameters that have gradients, or none")
        moments = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
        averages = [self._averages[p] for p in params] if any(averaged) else []
        lists = [[own_part(t) for t in tensors] for tensors in (params, [p.grad for p in params], *moments, averages)]
        sizes = [len(members) for members in trained]
        if is_sharded(params[0]):
            sizes[-1] += 1
            _add_verdict(params[0], lists)
        adam_ema_(
            *lists[:4],
            self._step,
            self.skipped if skipped is None else skipped,
            self._rates,
            averages=lists[4],
            average_weight=self.average_weight,
            groups=[
                Group(size, tuple(group["betas"]), group["eps"], group["weight_decay"])
                for size, group in zip(sizes, self.param_groups, strict=True)
            ],
            backend=self.backend,
        )
        return loss

    def read_rates(self) -> None:
        """Copy the groups' learning rates to the device. `step` does so; before a replay of it, the caller has to."""
        if len(self._rates_filled) != len(self.param_groups):
            self._rates = self._rates.new_zeros(len(self.param_groups))
            self._rates_filled = [None] * len(self.param_groups)
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                self._rates.select(0, index).copy_(lr.reshape(()))
                self._rates_filled[index] = None
            elif lr != self._rates_filled[index]:  # only then: a captured graph would fill in the old rate for ever
                self._rates.select(0, index).fill_(lr)
                self._rates_filled[index] = lr

    def _start(self, params: list[nn.Parameter]) -> None:
        """Make the state of parameters that have none; all share one count."""
        started = [p for p in params if p in self.state]
        if len(started) not in (0, len(params)) or (started and len(self.state) != len(params)):
            raise ConfigError(
                "AdamEma counts the steps of all parameters together, but some had no gradient in this step or an "
                "earlier one: give it only parameters that always have one, or use torch.optim.Adam"
            )
        if not started:
            for p in params:
                self.state[p] = {
                    "step": self._step,
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.Adam has it, with a separate count for every parameter."""
        saved = super().state_dict()
        counted = {index: {**state, "step": state["step"].clone()} for index, state in saved["state"].items()}
        return {**saved, "state": counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of an AdamEma or a torch.optim.Adam. Changes nothing if it cannot be loaded."""
        steps = {float(state["step"]) for state in state_dict["state"].values()}
        if len(steps) > 1:
            raise ConfigError(f"AdamEma counts the steps of all parameters together, and the state has {sorted(steps)}")
        on = [name for name in _MISSING if any(group.get(name) for group in state_dict["param_groups"])]
        if on:
            raise ConfigError(f"AdamEma has no {', '.join(on)}, but the state comes from an optimizer that has")
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        self._step.fill_(steps.pop() if steps else 0)
        for p, state in self.state.items():
            state["step"] = self._step
            for name in ("exp_avg", "exp_avg_sq"):  # laid out like the parameter, as a saved tensor need not be
                state[name] = laid_out_as(p, state[name])
        self._rates_filled = [None] * len(self._rates_filled)

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Raise ConfigError unless moments have their parameters' shapes: torch.optim.Optimizer does not check."""
        params = _parameters(self)
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for p, number in zip(params, numbers, strict=False):  # the caller refuses differing counts
            for name, moment in state_dict["state"].get(number, {}).items():
                if name != "step" and moment.shape != p.shape:
                    raise ConfigError(f"{name} of parameter {number} is {tuple(moment.shape)}, not {tuple(p.shape)}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _add_verdict(sharded: Any, lists: list[list[Tensor]]) -> None:
    """Append one number to parameters, gradients, moments and averages: its gradient is NaN on every rank if any rank's
    shard of a gradient is not finite, else 0. So all ranks skip the same steps."""
    parts = [g for g in lists[1] if g.numel()]
    nothing = torch.zeros(1, device=sharded.device)
    largest = torch.nn.utils.get_total_norm(parts, float("inf")) if parts else nothing
    failed = largest.isfinite().logical_not().float().view(1)
    dist.all_reduce(failed, group=sharded.device_mesh.get_group())
    for tensors in lists:
        if tensors:
            tensors.append(nothing.clone())
    lists[1][-1] = torch.where(failed > 0, torch.nan, 0.0)


def make_adam(
    params: Iterable[nn.Parameter],
    lr: float,
    lazy_interval: int = 0,
    *,
    averages: Mapping[nn.Parameter, Tensor] | None = None,
    backend: Backend = "auto",
) -> AdamEma:
    """Adam with betas (0, 0.99), eps 1e-8, over the trainable parameters; `averages` as for `AdamEma`.

    `lazy_interval` > 0 adds the correction for a regulariser that takes a separate step every `lazy_interval`
    iterations: `c = interval / (interval + 1)`, learning rate `lr * c`, `beta2 ** c` (Karras et al. 2020, appendix B).
    """
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    params = [p for p in params if p.requires_grad]
    return AdamEma(params, lr * c, (0.0, 0.99**c), 1e-8, averages=averages, backend=backend)


class StepGuard:
    """Averages the gradients over the ranks, takes the optimizer's step, and ends a run that no longer takes any.

    `AdamEma` skips a step as a whole if a gradient is not finite; nothing is zeroed or clipped. Skipped steps are
    counted in `skipped` and `skipped_in_row`.

    No step waits for the device to end it: the count is copied to the host after it, and read when this guard's next
    step is due, an iteration later, or when a property asks. All ranks count alike, as they average first.

    Args:
        name: the step's, for error messages; steps of several kinds may share an optimizer.
        limit: how many skipped steps in a row end the run.
        nonfinite: "skip" as above; "replace" takes every step, with 0 for NaN and +-1e5 for infinities.
    """

    def __init__(self, name: str, optimizer: AdamEma, world: World, limit: int, nonfinite: Nonfinite = "skip") -> None:
        self.name, self.optimizer, self.limit, self.nonfinite = name, optimizer, limit, nonfinite
        whole = [p for p in _parameters(optimizer) if not is_sharded(p)]  # FSDP2 averages the gradients of the others
        self._ranks = GradientExchange(whole, world) if world.size > 1 else None
        self.count = torch.zeros_like(optimizer.skipped)
        """How many steps were skipped, int64 (), on the device."""
        self._on_host = torch.zeros((), dtype=torch.int64, pin_memory=self.count.is_cuda)
        self._copied = torch.cuda.Event() if self.count.is_cuda else None
        self._unread = False
        self._skipped = 0
        self._skipped_in_row = 0

    @property
    def skipped(self) -> int:
        """Steps skipped in the whole run. Waits for the previous step."""
        self._read()
        return self._skipped

    @property
    def skipped_in_row(self) -> int:
        """Steps skipped since the last one taken. Waits for the previous step."""
        self._read()
        return self._skipped_in_row

    def step(self) -> Tensor:
        """Apply the accumulated gradients and clear them; nothing changes if they are not finite.

        Calls `begin`, `pack`, `exchange`, `apply` and `end` in turn: captured steps contain `pack` and `apply`. Returns
        what `apply` returns.

        Raises:
            DivergedError: the last `limit` steps were skipped; this one is not attempted.
        """
        self.begin()
        self.pack()
        self.exchange()
        norm = self.apply()
        self.end()
        return norm

    def begin(self) -> None:
        """The host's work before a step. Raises as `step`."""
        if self.skipped_in_row >= self.limit:
            raise DivergedError(f"{self.limit} {self.name} steps in a row had gradients that were not finite")
        self.optimizer.read_rates()

    def pack(self) -> None:
        """Move the gradients to the buffer for the exchange. Does nothing for a single process."""
        if self._ranks is not None:
            self._ranks.pack()

    def exchange(self) -> None:
        """Between `pack` and `apply`, and outside of any capture: sum the gradients over the ranks."""
        if self._ranks is not None:
            self._ranks.average()

    def apply(self) -> Tensor:
        """The device's work: apply the gradients if they are finite, and clear them.

        Returns the Euclidean norm, float32 () on their device, of all gradients together, averaged over the ranks.
        """
        # Averaged before the check, so that the ranks agree: one non-finite gradient makes the mean non-finite.
        if self._ranks is not None:
            self._ranks.unpack()
        gradients = [p.grad for p in _parameters(self.optimizer) if p.grad is not None]
        if self.nonfinite == "replace":
            for gradient in map(own_part, gradients):
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if is_sharded(norm) else norm
        self.optimizer.step(skipped=self.count)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def end(self) -> None:
        """The host's request after a step: copy the count."""
        self._on_host.copy_(self.count, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._unread = True

    def changing(self) -> Iterator[Tensor]:
        """Every tensor that steps change, except the parameters: counts, moments, and the exchanged buffer."""
        yield self.count
        for state in self.optimizer.state.values():
            yield from (t for t in state.values() if isinstance(t, Tensor))
        if self._ranks is not None:
            yield self._ranks.buffer

    def restore(self, skipped: int) -> None:
        """Continue counting from a checkpoint's `skipped`."""
        self.count.fill_(skipped)
        self._skipped, self._skipped_in_row, self._unread = skipped, 0, False

    def _read(self) -> None:
        if not self._unread:
            return
        if self._copied is not None:
            self._copied.synchronize()
        skipped = int(self._on_host)
        self._skipped_in_row = self._skipped_in_row + 1 if skipped > self._skipped else 0
        self._skipped, self._unread = skipped, False
