"""Lists and folders of images -> one data frame a side -> batches."""

from workbench.data.dataset import DataError, Dataset, fingerprint, val_fingerprint
from workbench.data.lists import on_disk, read_list
from workbench.data.loader import Batch, eval_loader, explain_worker_crash, own_places, train_loader
from workbench.data.sampler import DRAW, ERASE, MIX, Sampler, epoch_permutation, rng_for, step_seed
from workbench.data.shards import (
    check_shards,
    is_index,
    open_cache,
    open_index,
    version_digests,
    write_index,
)
from workbench.data.sources import describe_skipped, image_files, load_dataset
from workbench.data.tables import own_columns
from workbench.data.verify import available_cpus, check_data, drop_corrupt, verify_images
from workbench.schedule import steps_per_epoch
