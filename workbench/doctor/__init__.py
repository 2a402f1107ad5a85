"""What a recipe will do, and what speaks against it, before training.

    for finding in doctor.examine(recipe, images=1_281_167, classes=1000):
        print(finding)

`doctor.teachers` measures teachers, `doctor.throughput` measures speed; both import torch, and
this package does not. Findings are advice: nothing is refused because of them.
"""

from workbench.doctor.rules import examine, nothing_left, worth_measuring
