"""Adam with the finite check and the moving average in one pass, and the guard that counts skipped steps."""

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
"""What torch.optim.Adam can be told to do and this one cannot."""


class AdamEma(torch.optim.Optimizer):
    """torch.optim.Adam that leaves out, whole, every step with a gradient that is not finite, and averages on the way.

    `state_dict()` is that of torch.optim.Adam and loads into one, and the other way round. The counts, the learning
    rates and the averages' weight are tensors on the parameters' device; nothing waits for the device.
    The learning-rate schedulers of PyTorch, copy.deepcopy and pickle work as with its own optimizers; a copy has the
    counts, and averages of its own unless it is copied together with the network that they belong to.

    Each process steps its parts of the parameters that FSDP2 has spread, and all of them take a step or leave it out
    together: every process calls `step`. The moments are spread alike, in `state_dict()` too; it loads whole ones.

    Args:
        params: float32 parameters of one device, or groups of them with learning rates and options of their own.
        lr: a number, or a tensor of one, which every step reads anew: inside a CUDA graph, one on the device.
        betas, eps, weight_decay: as of torch.optim.Adam.
        averages: for some or all parameters a tensor like it, moved towards it by `average_weight` in every step.
        backend: see gdd_fast.backend.

    Raises:
        ConfigError: parameters that gain or lose their gradients between steps, or that are added after the first; the
            check and the count are of all together. A state of an Adam with options that this one lacks.
        InputError: options out of range, averages that are not like their parameters.
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
        # the further keys are those that torch.optim.Adam expects when it loads this state
        flags = dict.fromkeys((*_MISSING, "capturable"), False)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": None, "fused": None}
        super().__init__(params, defaults | flags)
        self.backend = backend
        self._averages = dict(averages or {})
        device = self.param_groups[0]["params"][0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps left out since this object was made, int64; not those that `step` was told to count elsewhere."""
        self.average_weight = torch.zeros((), dtype=torch.float64, device=device)
        """How far the averages move: 0 not at all, 1 all the way."""
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._rates = torch.zeros(0, dtype=torch.float64, device=device)
        self._rates_filled: list[float | None] = []

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: torch.optim.Optimizer names only what every optimizer has."""
        own = ("backend", "skipped", "average_weight", "_averages", "_step", "_rates", "_rates_filled")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Before the first step, as all parameters share its count. Options that it leaves out are the optimizer's."""
        if self.state:
            raise ConfigError("AdamEma counts the steps of all parameters together: add groups before the first step")
        options = {**self.defaults, **param_group}
        check_options(options["betas"], options["eps"], options["weight_decay"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, skipped: Tensor | None = None) -> Any:
        """Apply the gradients if all are finite; if not, add one to `skipped`, by default this object's.

        A changed `lr` of a group, or a number changed inside it if it is a tensor, counts from the next step on.
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
        """Bring the groups' learning rates to the device. `step` does; before a replay of it, somebody has to."""
        if len(self._rates_filled) != len(self.param_groups):
            self._rates = self._rates.new_zeros(len(self.param_groups))
            self._rates_filled = [None] * len(self.param_groups)
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                self._rates.select(0, index).copy_(lr.reshape(()))
                self._rates_filled[index] = None
            elif lr != self._rates_filled[index]:  # else not: a captured graph would fill in the old one for ever
                self._rates.select(0, index).fill_(lr)
                self._rates_filled[index] = lr

    def _start(self, params: list[nn.Parameter]) -> None:
        """Make the state of parameters that have none; all share one count."""
        started = [p for p in params if p in self.state]
        if len(started) not in (0, len(params)) or (started and len(self.state) != len(params)):
            raise ConfigError(
                "AdamEma counts the steps of all parameters together, and some had no gradient in this step or an "
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
        """The state as torch.optim.Adam has it, with a count of its own for every parameter."""
        saved = super().state_dict()
        counted = {index: {**state, "step": state["step"].clone()} for index, state in saved["state"].items()}
        return {**saved, "state": counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of an AdamEma or a torch.optim.Adam. Nothing is changed if it cannot be loaded."""
        steps = {float(state["step"]) for state in state_dict["state"].values()}
        if len(steps) > 1:
            raise ConfigError(f"AdamEma counts the steps of all parameters together, and the state has {sorted(steps)}")
        on = [name for name in _MISSING if any(group.get(name) for group in state_dict["param_groups"])]
        if on:
            raise ConfigError(f"AdamEma has no {', '.join(on)}, and the state is of an optimizer that has")
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        self._step.fill_(steps.pop() if steps else 0)
        for p, state in self.state.items():
            state["step"] = self._step
            for name in ("exp_avg", "exp_avg_sq"):  # in memory like the parameter, which a saved tensor need not be
                state[name] = laid_out_as(p, state[name])
        self._rates_filled = [None] * len(self._rates_filled)

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Raise ConfigError if a moment has not its parameter's shape, which torch.optim.Optimizer does not look at."""
        params = _parameters(self)
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for p, number in zip(params, numbers, strict=False):  # counts that differ are refused by the caller
            for name, moment in state_dict["state"].get(number, {}).items():
                if name != "step" and moment.shape != p.shape:
                    raise ConfigError(f"{name} of parameter {number} is {tuple(moment.shape)}, it is {tuple(p.shape)}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _add_verdict(sharded: Any, lists: list[list[Tensor]]) -> None:
    """Put one number more behind parameters, gradients, moments and averages: its gradient is NaN on every rank if any
    rank's part of a gradient is not finite, else 0. So all of them leave out the same steps."""
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
    """Adam with betas (0, 0.99), eps 1e-8, over the parameters that train; `averages` as of `AdamEma`.

    `lazy_interval` > 0 adds the correction for a regulariser that takes one step of its own every that many
    iterations: `c = interval / (interval + 1)`, learning rate `lr * c`, `beta2 ** c` (Karras et al. 2020, appendix B).
    """
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    params = [p for p in params if p.requires_grad]
    return AdamEma(params, lr * c, (0.0, 0.99**c), 1e-8, averages=averages, backend=backend)


class StepGuard:
    """Averages the gradients over the ranks, takes the optimizer's step, and ends a run that takes none any more.

    `AdamEma` leaves a step out, whole, if a gradient is not finite; nothing is zeroed or clipped. Here that is counted,
    in `skipped` and in `skipped_in_row`.

    Nothing waits for the device: the count of a step is copied to the host behind it and read when the next step of
    this guard is due, an iteration later, or when somebody asks. All ranks count alike, as they average first.

    Args:
        name: of the step, for the error's message; steps of several kinds may share an optimizer.
        limit: skipped steps in a row that end the run.
        nonfinite: "skip" as above; "replace" takes every step, with 0 for NaN and +-1e5 for infinities.
    """

    def __init__(self, name: str, optimizer: AdamEma, world: World, limit: int, nonfinite: Nonfinite = "skip") -> None:
        self.name, self.optimizer, self.limit, self.nonfinite = name, optimizer, limit, nonfinite
        whole = [p for p in _parameters(optimizer) if not is_sharded(p)]  # FSDP2 averages the others' gradients
        self._ranks = GradientExchange(whole, world) if world.size > 1 else None
        self.count = torch.zeros_like(optimizer.skipped)
        """On the device: how many steps were skipped."""
        self._on_host = torch.zeros((), dtype=torch.int64, pin_memory=self.count.is_cuda)
        self._copied = torch.cuda.Event() if self.count.is_cuda else None
        self._unread = False
        self._skipped = 0
        self._skipped_in_row = 0

    @property
    def skipped(self) -> int:
        """Steps left out in the whole run. Waits for the step before."""
        self._read()
        return self._skipped

    @property
    def skipped_in_row(self) -> int:
        """Steps left out since the last one that was taken. Waits for the step before."""
        self._read()
        return self._skipped_in_row

    def step(self) -> Tensor:
        """Apply the accumulated gradients and clear them; nothing changes if they are not finite.

        `begin`, `pack`, `exchange`, `apply` and `end` in turn: steps that are captured have `pack` and `apply` within
        them. Returns what `apply` returns.

        Raises:
            DivergedError: the last `limit` steps were skipped; this one is not tried.
        """
        self.begin()
        self.pack()
        self.exchange()
        norm = self.apply()
        self.end()
        return norm

    def begin(self) -> None:
        """What the host does before a step. Raises as `step`."""
        if self.skipped_in_row >= self.limit:
            raise DivergedError(f"{self.limit} {self.name} steps in a row had gradients that were not finite")
        self.optimizer.read_rates()

    def pack(self) -> None:
        """Bring the gradients to where the ranks exchange them. One process has nothing to exchange."""
        if self._ranks is not None:
            self._ranks.pack()

    def exchange(self) -> None:
        """Between `pack` and `apply`, and outside of any capture: the ranks add their gradients up."""
        if self._ranks is not None:
            self._ranks.average()

    def apply(self) -> Tensor:
        """What the device does: the gradients are applied if they are finite, and cleared.

        Returns the Euclidean norm of all gradients together, averaged over the ranks, float32 () on their device.
        """
        # Averaged before they are looked at, so that the ranks agree: one that is not finite makes the mean so.
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
        """What the host asks for behind a step."""
        self._on_host.copy_(self.count, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._unread = True

    def changing(self) -> Iterator[Tensor]:
        """Every tensor that steps change but the parameters: counts, moments, and what the ranks exchange."""
        yield self.count
        for state in self.optimizer.state.values():
            yield from (t for t in state.values() if isinstance(t, Tensor))
        if self._ranks is not None:
            yield self._ranks.buffer

    def restore(self, skipped: int) -> None:
        """Go on counting from a checkpoint's `skipped`."""
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
