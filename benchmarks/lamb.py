"""What a step of `lamb.LAMB` costs beside timm's Lamb and torch's fused AdamW.

    python benchmarks/lamb.py [--device auto] [--model resnet50]

Each optimizer has its own copy of the model's parameters and of one set of random gradients; the
LAMBs clip and decay. They run in turn, a block of steps each, and ratios to timm are taken round by
round. Fused AdamW neither clips nor adapts: it is the floor, not a rival.
Claim: the median ratio of LAMB to timm's is at most 0.7 on a CPU and 0.6 on a GPU.
"""

import argparse
import statistics
import time

import timm
import timm.optim
import torch

from workbench.training import pick_device
from workbench.training.lamb import LAMB

STEPS = 5  # of a block
CLAIM = {"cpu": 0.7, "cuda": 0.6}
OPTIONS = {"lr": 1e-3, "weight_decay": 0.02}
OPTIMIZERS = {
    "timm Lamb": lambda params: timm.optim.Lamb(params, max_grad_norm=1.0, **OPTIONS),
    "LAMB": lambda params: LAMB(params, max_grad_norm=1.0, **OPTIONS),
    "fused AdamW": lambda params: torch.optim.AdamW(params, fused=True, **OPTIONS),
}


def with_gradients(weights: list[torch.Tensor], device: torch.device) -> list[torch.nn.Parameter]:
    """Copies as parameters on the device; the gradients are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(w.detach().clone().to(device)) for w in weights]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return params


def block(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Milliseconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS * 1000


def measure(model_name: str, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step, round by round, after a round to warm up."""
    weights = list(timm.create_model(model_name).parameters())
    made = {name: make(with_gradients(weights, device)) for name, make in OPTIMIZERS.items()}
    taken = {name: [] for name in made}
    for _ in range(1 + rounds):
        for name, optimizer in made.items():
            taken[name].append(block(optimizer, device))
    return {name: times[1:] for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    device = pick_device(asked.device)
    taken = measure(asked.model, device, asked.rounds)
    claim = CLAIM[device.type]
    print(f"{asked.model}, {device}, median of {asked.rounds} rounds of {STEPS} steps")
    print(f"{'':12} {'ms a step':>10} {'to timm':>8} {'from':>6} {'to':>6}")
    medians = {}
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(times, taken["timm Lamb"], strict=True)]
        medians[name] = statistics.median(ratios)
        print(
            f"{name:12} {statistics.median(times):10.2f} {medians[name]:8.3f} "
            f"{min(ratios):6.3f} {max(ratios):6.3f}"
        )
    print(f"claim: LAMB at most {claim} of timm's")
    raise SystemExit(medians["LAMB"] > claim)


if __name__ == "__main__":
    main()
