"""CyloraAdamW: torch's AdamW whose clipping and step are one call of cylora's kernels."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from cylora import checks
from cylora.config import LoraTrainingConfig
from cylora.errors import ConfigError, InputError, StateError
from cylora.integrations.tensors import Tensors, check_parameters
from cylora.optimizer import check_rate, norm_limit
from cylora.parts import max_rate

__all__ = ["CyloraAdamW"]

# What torch.optim.AdamW can and this cannot. ``foreach`` and ``fused`` choose among torch's loops and are of no effect.
UNSUPPORTED = ("amsgrad", "capturable", "differentiable")
Rule = tuple[float, float, float, float, float, bool]


class CyloraAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that clips by global norm, of float32 parameters on the CPU.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, maximize, foreach, fused
        As in `torch.optim.AdamW`, with beta2 in [0.5, 1), eps >= 1e-30 and lr times weight_decay at most 2. ``foreach``
        and ``fused`` have no effect.
    amsgrad, capturable, differentiable : False
    max_grad_norm : float > 0
        Norm of the gradients of all groups together above which they are scaled down while the step reads them; ``inf``
        does not. It replaces `torch.nn.utils.clip_grad_norm_`, but for the 1e-6 that this adds to the norm. May be
        assigned.
    nonfinite : "raise" or "skip"
        What a gradient that is not finite does: raise NonFiniteGradientError, or count a step that changes nothing.
    threads : int in 1..64, or None
        Most threads that a step may use, of cylora's own; None is CYLORA_NUM_THREADS, or 1. No bit depends on it.

    Attributes
    ----------
    grad_norm : float
        The last step's norm before clipping, accumulated in float64.
    skipped_steps : int

    Raises
    ------
    ConfigError, InputError, ValueError
        If an option or a parameter breaks its rule: parameters are plain, contiguous, share no memory.

    Notes
    -----
    A step happens wholly or not at all, over all groups. Parameters are updated where they lie. Gradients are float32,
    float16 or bfloat16; one that is not contiguous is copied first, others are read as they are, and none is written.
    ``exp_avg`` and ``exp_avg_sq`` are views of one flat vector each. State dicts are those of `torch.optim.AdamW`, to
    and from which they can go; ``max_grad_norm``, ``nonfinite`` and ``threads`` are not in them.
    """

    state: defaultdict[Any, Any]
    param_groups: list[dict[str, Any]]

    def __init__(  # noqa: PLR0917 - torch's own order
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float = math.inf,
        nonfinite: str = "raise",
        threads: int | None = None,
    ) -> None:
        LoraTrainingConfig(nonfinite=nonfinite, threads=threads)
        for name, value in zip(UNSUPPORTED, (amsgrad, capturable, differentiable), strict=True):
            if value:
                raise ConfigError(f"{name} must be False, since CyloraAdamW does not support it, got {value!r}")
        self.max_grad_norm = max_grad_norm
        self.nonfinite, self.threads = nonfinite, threads
        self.grad_norm, self.skipped_steps = 0.0, 0
        self._tensors: Tensors | None = None
        self._known: dict[int, tuple[Any, LoraTrainingConfig]] = {}  # options of each group when last seen, checked
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused)
        self._step_supports_amp_scaling = False  # a GradScaler unscales the gradients itself and may leave the step out

    @property
    def max_grad_norm(self) -> float:  # noqa: D102 - described with the class
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._max_grad_norm = checks.norm_limit("max_grad_norm", value, ConfigError)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's optimizers do; if it breaks a rule, there is no new group."""
        params: Any = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(params, list | tuple) or hasattr(params, "__next__"):
            param_group["params"] = params = list(params)  # an iterator can be read once
            seen: dict[int, int] = {}
            for place, param in enumerate(params):
                first = seen.setdefault(id(param[1] if isinstance(param, tuple) else param), place)
                if first != place:
                    index = len(self.param_groups)
                    raise InputError(f"parameter {place} of group {index} must not be parameter {first} of it too")
        super().add_param_group(param_group)
        try:
            check_parameters(self.param_groups)
            self._rule(len(self.param_groups) - 1, param_group)
        except BaseException:
            self.param_groups.pop()
            raise

    def _rule(self, index: int, group: Mapping[str, Any]) -> Rule:
        """Return what the kernel needs of a group's options, which may be others at each step."""
        for name in UNSUPPORTED:
            if group.get(name):
                raise ConfigError(f"{name} of group {index} must be False, since CyloraAdamW does not support it")
        try:
            beta1, beta2 = map(float, group["betas"])  # copies: a list or a tensor may change in place
            options = (beta1, beta2, _copied(group["eps"]), _copied(group["weight_decay"]))
            known, config = self._known.get(index, (None, None))
            if config is None or options != known:
                adam = dict(zip(("beta1", "beta2", "eps", "weight_decay"), options, strict=True))
                config = LoraTrainingConfig(learning_rate=0.0, **adam)
                self._known[index] = (options, config)
            rate = check_rate(group["lr"], max_rate(config, None))
        except KeyError as error:
            raise ConfigError(f"options of group {index} must have {error}, got none: another optimizer's?") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"options of group {index}: {error}") from None
        return rate, config.beta1, config.beta2, config.eps, config.weight_decay, bool(group.get("maximize"))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip and do one step of all groups; return what ``closure`` returns, which is called first.

        Parameters without a gradient are left out, and their step does not advance.

        Raises
        ------
        NonFiniteGradientError, InputError, StateError, ConfigError, TrainerBusyError
            Nothing was written.
        """
        return _step_among_hooks(self, closure) if self._is_watched() else self._step(closure)

    step.hooked = True  # type: ignore[attr-defined] # else torch would wrap it, as `_step_among_hooks` is

    def _is_watched(self) -> bool:
        """Return whether torch's wrapper of a step has anything to do. It takes a tenth of a small step."""
        mine = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        everyones = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        return bool(mine or everyones or torch.autograd.profiler._is_profiler_enabled)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = [self._rule(index, group) for index, group in enumerate(self.param_groups)]
        lists = [p if isinstance(p := group["params"], list) else list(p) for group in self.param_groups]
        limit = norm_limit(self.max_grad_norm)
        tensors, done = self._tensors, None
        if tensors is not None:
            done = tensors.apply(lists, self.state, rules, self.max_grad_norm, limit)
        if tensors is None or done is None:
            tensors = Tensors(self.param_groups, self.state, threads=self.threads, skips=self.nonfinite == "skip")
            self.state, self._tensors = defaultdict(dict, tensors.state), tensors
            done = tensors.apply(lists, self.state, rules, self.max_grad_norm, limit)
        self.grad_norm = tensors.norm
        if done is None:
            raise StateError("parameters and state must stay where they are during a step, got other memory meanwhile")
        if done:
            torch.autograd.graph.increment_version(tensors.stepped)  # as torch's own operations in place do
        else:
            self.skipped_steps += 1
        return loss

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_max_grad_norm", "nonfinite", "threads", "grad_norm", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state, of a state dict (`load_state_dict` ends here) or a pickle, or raise."""
        new = {**self.__dict__, **state}
        tensors = Tensors(new["param_groups"], new["state"], threads=new["threads"], skips=new["nonfinite"] == "skip")
        self.__dict__.setdefault("_known", {})  # a pickle has none
        for index, group in enumerate(new["param_groups"]):
            self._rule(index, group)
        super().__setstate__({**state, "state": defaultdict(dict, tensors.state)})
        self._tensors = tensors


_step_among_hooks = torch.optim.Optimizer.profile_hook_step(CyloraAdamW._step)


def _copied(option: Any) -> Any:
    """Return what a tensor says now; anything else as it is."""
    if not isinstance(option, torch.Tensor):
        return option
    return option.item() if option.numel() == 1 else option.tolist()
