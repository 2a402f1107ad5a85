"""What an exported network costs beside the one it was: torch eager, torch.compile, ONNX, int8.

    python benchmarks/export.py [--models resnet18 resnet50] [--rounds 7] [--threads 2]

224 pixels, batch 1, the CPU, in turn, weights at random. Claims, medians of the rounds' ratios:
onnxruntime at least 1.3 times as fast as torch eager (channels last, as the workbench evaluates),
int8 at least 2.5 times as fast as onnxruntime in float32 where the processor has VNNI.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

ONNX, INT8 = 1.3, 2.5


def main() -> None:
    """Prints a table for each model; exits with an error where a claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10, help="of each form in a round")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    vnni = any("vnni" in word for word in Path("/proc/cpuinfo").read_text().split())
    missed = []
    for name in options.models:
        forms = _forms(name, options.threads)
        rounds = [{form: _median(call, options.calls) for form, call in forms.items()}
                  for _ in range(options.rounds)]  # fmt: skip
        print(f"{name}, {options.threads} threads, ms an image at batch 1:")
        for form in forms:
            print(f"  {form:14s} {1000 * statistics.median(r[form] for r in rounds):8.2f}")
        for over, under, claim in (("torch eager", "onnx", ONNX), ("onnx", "int8", INT8)):
            ratios = sorted(r[over] / r[under] for r in rounds)
            ratio = statistics.median(ratios)
            said = f"{under} is {ratio:.2f} times as fast as {over}"
            print(f"  {said} ({ratios[0]:.2f} to {ratios[-1]:.2f}), claim {claim}")
            if ratio < claim and (under != "int8" or vnni):
                missed.append(f"{name}: {said}")
    if missed:
        raise SystemExit("; ".join(missed))


def _forms(name: str, threads: int) -> dict[str, Callable[[], object]]:
    import torch

    from workbench import export, models
    from workbench.recipe import Recipe

    torch.set_num_threads(threads)
    seen = export.preprocess(Recipe(image_size=224, val_resize=256))
    network = export.Network(models.create(name, 1000), seen).eval()
    onnx = export.to_onnx(network)
    feeds = [network.to_input(network.noise(8)).numpy() for _ in range(4)]
    int8, _ = export.to_int8(onnx, feeds)
    feed = network.to_input(network.noise(1))
    plain = {"data": feed.numpy()}
    whole, small = export.session(onnx, threads), export.session(int8, threads)
    last = feed.contiguous(memory_format=torch.channels_last)
    eager = network.to(memory_format=torch.channels_last)
    compiled = torch.compile(network)

    def once(module: Callable) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return module(last)

        call()
        return call

    return {
        "torch eager": once(eager),
        "torch.compile": once(compiled),
        "onnx": lambda: whole.run(["score"], plain),
        "int8": lambda: small.run(["score"], plain),
    }


def _median(call: Callable[[], object], calls: int) -> float:
    time.sleep(0.5)  # the threads of the form before spin for a while, on the same cores
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
