"""Distillation: teachers, a student with adapters, losses, and a cache of teacher logits.

    kd = Distillation(recipe, model, classes, device)      # checks everything
    logits, features = kd.student(images)
    outputs = kd.teacher_outputs(images, batch)             # without gradients
    loss = kd.loss(logits, features, outputs, targets)      # 0-d, mean over the images

Hinton, Vinyals, Dean, arXiv 1503.02531. A teacher gets the student's batch, augmented and mixed,
at its own image size and normalisation: Beyer et al., arXiv 2106.05237, section 3.
"""

from workbench.distillation.student import Distillation, DistillPair, Student, TeacherOutput
from workbench.distillation.teachers import (
    DistillationError,
    Teacher,
    TeacherAdapter,
    open_teachers,
    without_teacher,
)

__all__ = [
    "DistillPair",
    "Distillation",
    "DistillationError",
    "Student",
    "Teacher",
    "TeacherAdapter",
    "TeacherOutput",
    "open_teachers",
    "without_teacher",
]
