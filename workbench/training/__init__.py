"""Training: `fit` is the loop; the other modules are its parts."""

from workbench.schedule import TrainingError, lr_schedule
from workbench.training.build import (
    build_initial_model,
    create_model,
    load_run_model,
    other_normalization,
)
from workbench.training.distributed import (
    autocast,
    is_main,
    pick_device,
    pick_precision,
    pick_workers,
)
from workbench.training.environment import processor
from workbench.training.inputs import (
    DeviceTransform,
    Normalize,
    build_pixel_caches,
    eval_transform,
    preview_batch,
    sampler_options,
    train_transform,
)
from workbench.training.loop import fit, lr_range_test
from workbench.training.losses import loss_function
from workbench.training.optim import check_optimizer, create_optimizer, ema_update, lr_scales
from workbench.training.setup import check_same_recipe, resumed_state, trained_on_validation
from workbench.training.validation import eval_workers, initial_loss, predictions
