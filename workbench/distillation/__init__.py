"""Distillation: teachers, a student with adapters, losses, and a cache of teacher logits.

kd = Distillation(recipe, model, classes, device)  # checks everything
logits, features = kd.student(images)
outputs = kd.teacher_outputs(images, batch)        # without gradients
loss = kd.loss(logits, features, outputs, targets) # 0-d, mean over the images
"""

from workbench.distillation.student import Distillation
from workbench.distillation.teachers import (
    DistillationError,
    Teacher,
    TeacherAdapter,
    open_teachers,
    without_teacher,
)
