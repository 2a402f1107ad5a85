"""LAMB: Adam whose step in every tensor has a length in proportion to that tensor.

    optimizer = LAMB(model.parameters(), lr=5e-3, weight_decay=0.02, max_grad_norm=1.0)

You et al., arXiv 1904.00962, algorithm 2, with the global clipping of NVIDIA's NVLAMB.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Elements a CPU takes at a time: 1 MiB of float32, so that the passes after the first read a cache.
_BATCH = 2**18


class LAMB(torch.optim.Optimizer):
    """One step, for every tensor p with gradient g, at its own step number s, counted from 1:

        g <- g / max(1, G / max_grad_norm)      G: norm of all gradients of all groups together
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g g
        u  = m / (1 - b1^s) / (sqrt(v / (1 - b2^s)) + eps) + weight_decay p
        r  = |p| / |u|                          1 where either norm is 0
        p <- p - lr r u

    r is 1 in groups with neither weight_decay nor always_adapt, and at most 1 with trust_clip.
    max_grad_norm None switches the clipping off; all else may differ between parameter groups.
    Raises ValueError for values out of range, RuntimeError for sparse gradients.

    A step does not wait for a GPU, unless it clips over several devices. After it `.grad` may hold
    the clipped gradients. A parameter without gradient is left alone, and its step number too. The
    state of a parameter is that of torch's fused Adam: exp_avg and exp_avg_sq in its dtype, step in
    float32 on its device.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        trust_clip: bool = False,
        always_adapt: bool = False,
    ):
        if max_grad_norm is not None and not 0 < max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm is {max_grad_norm}: a number above 0, or None")
        self.max_grad_norm = max_grad_norm
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"trust_clip": trust_clip, "always_adapt": always_adapt}
        # fused tells load_state_dict to put step in float32 beside its parameter.
        super().__init__(params, defaults | {"fused": True})

    def __getstate__(self) -> dict:
        """For pickle and deepcopy; torch's own lists its attributes one by one."""
        return super().__getstate__() | {"max_grad_norm": self.max_grad_norm}

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. Raises ValueError for values out of range."""
        group = self.defaults | param_group
        if "max_grad_norm" in group:
            raise ValueError("max_grad_norm is set for the whole optimizer, not for a group")
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < float("inf"):
                raise ValueError(f"{name} is {group[name]}: at least 0 and finite")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas is {group['betas']}: two numbers, at least 0 and below 1")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of all groups; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [(params, group) for group in self.param_groups for params in _batches(group)]
        clip = None
        if self.max_grad_norm is not None and batches:
            norm = _global_norm([params for params, _ in batches])
            clip = (norm / self.max_grad_norm).clamp(min=1.0)
        for params, group in batches:
            self._update(params, group, clip)
        return loss

    def _update(self, params: list[Tensor], group: dict, clip: Tensor | None) -> None:
        # The kernel subtracts Adam's direction from its first argument: with -weight_decay p
        # instead of p, and a rate of 1, the result is -u. It reads memory in order and ignores
        # strides, so gradients and state must have those of u.
        updates = torch._foreach_mul(params, -group["weight_decay"])
        states = [self._state(p, u) for p, u in zip(params, updates, strict=True)]
        grads = [_like(p.grad, u) for p, u in zip(params, updates, strict=True)]
        steps, *moments = zip(*states, strict=True)
        torch._foreach_add_(steps, 1)
        if clip is not None:
            # In place: copies would cost more than all the rest of the clipping. The kernel's own
            # grad_scale is no faster, is always float32, and MPS does not support it.
            torch._foreach_div_(grads, clip.to(params[0].device))
        # Private, but what torch.optim.Adam(fused=True) calls: one pass over memory, where public
        # functions take seven.
        adam = {"lr": 1.0, "weight_decay": 0.0, "eps": group["eps"]}
        adam |= {"beta1": group["betas"][0], "beta2": group["betas"][1]}
        adam |= {"amsgrad": False, "maximize": False}
        torch._fused_adam_(updates, grads, *moments, [], steps, **adam)
        if group["weight_decay"] == 0 and not group["always_adapt"]:
            torch._foreach_add_(params, updates, alpha=group["lr"])
            return
        p_norm, u_norm = _norms(params), _norms(updates)
        ratio = torch.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, 1.0)
        if group["trust_clip"]:
            ratio = ratio.clamp(max=1.0)
        torch._foreach_addcmul_(params, updates, (group["lr"] * ratio).unbind())

    def _state(self, p: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """step, exp_avg and exp_avg_sq of a parameter, with the strides of its update."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(u), torch.zeros_like(u)
        for name in ("exp_avg", "exp_avg_sq"):  # a loaded state may come from another memory format
            state[name] = _like(state[name], u)
        return state["step"], state["exp_avg"], state["exp_avg_sq"]


def _batches(group: dict) -> Iterable[list[Tensor]]:
    """The parameters with a gradient, in lists of one device and dtype, short ones for a CPU."""
    batches, seen = {}, 0
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"LAMB needs dense gradients, a parameter has {p.grad.layout}")
        piece = seen // _BATCH if p.device.type == "cpu" else 0
        batches.setdefault((p.device, p.dtype, piece), []).append(p)
        seen += p.numel()
    return batches.values()


def _norms(tensors: list[Tensor]) -> Tensor:
    """Their norms, in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def _global_norm(batches: list[list[Tensor]]) -> Tensor:
    """Norm of all gradients together, on the device of the first."""
    norms = [torch.linalg.vector_norm(_norms([p.grad for p in params])) for params in batches]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _like(tensor: Tensor, u: Tensor) -> Tensor:
    """The tensor, or a copy where its elements lie in another order than those of u."""
    dims = zip(tensor.shape, tensor.stride(), u.stride(), strict=True)
    if all(a == b for size, a, b in dims if size > 1):
        return tensor
    return torch.empty_like(u).copy_(tensor)
