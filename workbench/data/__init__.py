"""Lists and folders of images -> one data frame a side -> batches."""

from workbench.data.dataset import COLUMNS, DataError, Dataset, fingerprint
from workbench.data.lists import on_disk, read_list
from workbench.data.loader import (
    Batch,
    eval_loader,
    explain_worker_crash,
    own_places,
    train_loader,
)
from workbench.data.sampler import (
    BALANCE,
    DRAW,
    ERASE,
    MIX,
    ORDER,
    STEP,
    Sampler,
    Streams,
    apportion,
    epoch_permutation,
    repeat,
    rng_for,
    step_seed,
)
from workbench.data.sources import (
    describe_skipped,
    image_files,
    load_dataset,
    read_folders,
    stratified_split,
    subset,
)
from workbench.data.toy import digits, letters
from workbench.data.verify import (
    available_cpus,
    check_data,
    drop_corrupt,
    file_digest,
    report,
    verify_images,
)
from workbench.schedule import steps_per_epoch

# fmt: off
__all__ = [
    "BALANCE", "Batch", "COLUMNS", "DRAW", "DataError", "Dataset", "ERASE", "MIX", "ORDER",
    "STEP", "Sampler", "Streams", "apportion", "available_cpus", "check_data",
    "describe_skipped", "digits", "drop_corrupt", "epoch_permutation", "eval_loader",
    "explain_worker_crash", "file_digest", "fingerprint", "image_files", "letters",
    "load_dataset", "on_disk", "own_places", "read_folders", "read_list", "repeat", "report",
    "rng_for", "step_seed", "steps_per_epoch", "stratified_split", "subset", "train_loader",
    "verify_images",
]
