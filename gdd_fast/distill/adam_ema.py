"""Adam, the finite check and the moving average as one optimizer over `gdd_fast.ops.adam_ema`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.backend import Backend
from gdd_fast.errors import ConfigError
from gdd_fast.ops.adam_ema import adam_ema_


class AdamEma(torch.optim.Optimizer):
    """torch.optim.Adam that leaves out, whole, every step with a gradient that is not finite, and averages on the way.

    `state_dict()` is that of torch.optim.Adam and loads into one, and the other way round. The counts, the learning
    rate and the averages' weight are tensors on the parameters' device; nothing waits for the device but `applied()`.

    Args:
        params: float32 parameters of one device, in one group.
        lr, betas, eps, weight_decay: as of torch.optim.Adam.
        averages: for some or all parameters a tensor like it, moved towards it by `average_weight` in every step.
        backend: see gdd_fast.backend.

    Raises:
        ConfigError: more than one parameter group, or parameters that gain or lose their gradients between steps; the
            check and the count are of all together.
        InputError: averages that are not like their parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        averages: Mapping[nn.Parameter, Tensor] | None = None,
        backend: Backend = "auto",
    ) -> None:
        # the further keys are those that torch.optim.Adam expects when it loads this state
        flags = dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"), False)
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
        self._lr = torch.full((), lr, dtype=torch.float64, device=device)
        self._lr_filled = lr
        self._skipped_seen = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ConfigError("AdamEma takes one parameter group: its check and its count are of all parameters")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, skipped: Tensor | None = None) -> Any:
        """Apply the gradients if all are finite; if not, add one to `skipped`, by default this object's.

        A changed `param_groups[0]["lr"]` counts from the next step on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        if group["lr"] != self._lr_filled:  # not in every step: a captured graph would fill in the old one for ever
            self._lr.fill_(group["lr"])
            self._lr_filled = group["lr"]
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return loss
        self._start(params)
        states = [self.state[p] for p in params]
        arguments = (
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            self._step,
            self.skipped if skipped is None else skipped,
            self._lr,
        )
        options = {"betas": tuple(group["betas"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}
        averaged = [p in self._averages for p in params]
        if any(averaged) and not all(averaged):
            raise ConfigError("AdamEma averages all parameters that have gradients, or none")
        averages = [self._averages[p] for p in params] if any(averaged) else []
        adam_ema_(
            params,
            *arguments,
            averages=averages,
            average_weight=self.average_weight,
            backend=self.backend,
            **options,
        )
        return loss

    def applied(self) -> bool:
        """Whether all steps since the last call were applied. Waits for the device."""
        skipped = int(self.skipped)
        before, self._skipped_seen = self._skipped_seen, skipped
        return skipped == before

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
        """Continue from the state of an AdamEma or a torch.optim.Adam."""
        super().load_state_dict(state_dict)
        steps = {float(state["step"]) for state in self.state.values()}
        if len(steps) > 1:
            raise ConfigError(f"AdamEma counts the steps of all parameters together, and the state has {sorted(steps)}")
        if any(group.get("amsgrad") or group.get("maximize") for group in self.param_groups):
            raise ConfigError("AdamEma has neither amsgrad nor maximize, and the state is of a run with one of them")
        self._step.fill_(steps.pop() if steps else 0)
        for p, state in self.state.items():
            state["step"] = self._step
            for name in ("exp_avg", "exp_avg_sq"):  # in memory like the parameter, which a saved tensor need not be
                state[name] = torch.empty_like(p).copy_(state[name])
        self._lr_filled = None
