"""Which rows a step uses and which random numbers an image gets: functions of the seed alone.

The order of an epoch is a function of (seed, epoch); the augmentation of image i, of (seed, epoch,
i) and of the copy where i is used several times.
"""

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import pandas as pd

from workbench.data.dataset import DataError
from workbench.schedule import steps_per_epoch

ORDER, DRAW, STEP, ERASE, MIX, BALANCE = range(6)  # purposes of random numbers
LARGE = 4_000_000  # images from which on an epoch's order is computed, not stored
COPIES = 2**16  # copies of an image in an epoch that have different random numbers


class Streams:
    """Generators of one seed by purpose, epoch, index and copy; each call ends the one before.

    Philox counts in blocks that never overlap: Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011. The lowest counter word counts the numbers drawn; copies start 2^48 apart.
    """

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=seed)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def __call__(
        self, purpose: int, epoch: int = 0, index: int = 0, copy: int = 0
    ) -> np.random.Generator:
        self._state["state"]["counter"][:] = copy << 48, index, epoch, purpose
        self._bits.state = self._state
        return self._generator


def rng_for(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """The random numbers of a purpose and place (epoch, index, copy). `Streams` is faster."""
    return Streams(seed)(purpose, *place)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed of 64 bits for the model's randomness in one step (dropout, drop path)."""
    return int(rng_for(seed, STEP, step, rank).bit_generator.random_raw())


def epoch_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation (count,) of an epoch, a function of (seed, epoch) alone."""
    return rng_for(seed, ORDER, epoch).permutation(count)


def permuted(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The rows at these positions of an epoch's order, from a bijection of 0 to count - 1.

    A Feistel network of eight rounds (Luby and Rackoff, SIAM J. Comput. 17, 1988) permutes the
    numbers of 2w bits; one of `count` or more is permuted again, which is cycle walking (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Rounds mix as splitmix64 does
    (Steele et al., OOPSLA 2014).
    """
    width = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask, keys = np.uint64(2 ** int(width) - 1), rng_for(seed, ORDER, epoch).bit_generator
    keys = keys.random_raw(8)
    found = np.asarray(positions).astype(np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        left, right = found[todo] >> width, found[todo] & mask
        for key in keys:
            mixed = right + key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        found[todo] = left << width | right
        todo = todo[found[todo] >= count]
    return found.astype(np.int64)


def repeat(
    positions: np.ndarray, count: int, batch_size: int, copies: int
) -> tuple[np.ndarray, np.ndarray]:
    """What stands at positions of an epoch where a `copies`-th of `count` is used: place and copy.

    Hoffer et al., arXiv 1901.09335: the copies of an image are in one batch, each augmented
    differently. They are a `copies`-th of the batch apart, so that neighbours, which are mixed
    with each other, are different images.
    """
    size = max(1, batch_size // copies)
    chunk, at = np.divmod(positions, size * copies)
    copy, within = np.divmod(at, np.minimum(size, count - chunk * size))
    return chunk * size + within, copy


def apportion(shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers (n,) with the sum of the shares: those with the largest remainders rounded up.

    Equal remainders are ordered at random, so that over epochs none is preferred.
    """
    whole = np.floor(shares).astype(np.int64)
    # Six digits: equal remainders stay equal however the machine rounds, and 2.9999999 is a 3.
    remainders = np.round(shares - whole, 6)
    up = np.lexsort((rng.random(len(shares)), -remainders))[: round(shares.sum()) - whole.sum()]
    whole[up] += 1
    return whole


@dataclass(frozen=True, eq=False)
class Sampler:
    """The rows of a frame in each step, over all processes; a function of (seed, step).

    An epoch has as many images as there are labels: each once while `class_balanced_sampling` is 0.
    Otherwise a class of n images gets a share proportional to n ** (1 - b), Kang et al.,
    arXiv 1910.09217: 0.5 is the square-root sampling of Mahajan et al., arXiv 1805.00932, and 1
    uses all classes equally often. Images of one class are used equally often; the remainder is
    sampled again in every epoch. With `repeated_aug`, which uses a random part of the epoch, the
    shares hold on average. Raises DataError where an image would be used more than COPIES times.
    """

    labels: Sequence[int] | np.ndarray | pd.Series  # (n,)
    _: KW_ONLY
    seed: int
    batch_size: int
    drop_last: bool = False
    repeated_aug: int = 1
    class_balanced_sampling: float = 0.0
    _epochs: dict[int, tuple] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.class_balanced_sampling:
            return
        if len(self.labels) > LARGE:
            text = f"class_balanced_sampling: {len(self.labels):,} images are over {LARGE:,}"
            raise DataError(f"{text}, whose order is not stored; set it to 0")
        _, sizes, shares = self._classes
        times = np.ceil(np.ceil(np.round(shares, 6)) / sizes).astype(np.int64)
        if times.max() * self.repeated_aug > COPIES:
            raise DataError(
                f"label {np.unique(self.labels)[times.argmax()]} is so rare that each of its "
                f"images is used over {COPIES:,} times an epoch; lower class_balanced_sampling"
            )

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.labels), self.batch_size, self.drop_last)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the frame in a step, and the number of each one's copy; both read-only.

        A pair of row and copy is used at most once an epoch, so each has different random numbers.
        """
        epoch, slot = divmod(step, self.steps_per_epoch)
        part = slice(slot * self.batch_size, (slot + 1) * self.batch_size)
        if (count := len(self.labels)) > LARGE:
            at = np.arange(*part.indices(count))
            at, copies = repeat(at, count, self.batch_size, self.repeated_aug)
            rows = permuted(at, count, self.seed, epoch)
            rows.flags.writeable = copies.flags.writeable = False
            return rows, copies
        rows, copies = self._epoch(epoch)
        return rows[part], copies[part]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            shuffled = epoch_permutation(self.seed, epoch, len(self.labels))
            at = np.arange(len(shuffled))
            rows, copies = repeat(at, len(at), self.batch_size, self.repeated_aug)
            rows = shuffled[rows]
            if self.class_balanced_sampling:  # `shuffled` then is the order of the chosen rows
                chosen, number = self._balanced(epoch)
                rows, copies = chosen[rows], number[rows] * self.repeated_aug + copies
            rows.flags.writeable = copies.flags.writeable = False
            for old in list(self._epochs)[:-1]:  # at the turn of epochs two are in use
                del self._epochs[old]
            self._epochs[epoch] = rows, copies
        return self._epochs[epoch]

    @functools.cached_property
    def _classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The class of every row, without gaps; for every class its images and share of n."""
        _, of_row, sizes = np.unique(self.labels, return_inverse=True, return_counts=True)
        weights = sizes ** (1.0 - self.class_balanced_sampling)
        return of_row, sizes, weights * (len(of_row) / weights.sum())

    def _balanced(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (n,) of an epoch, class by class, and the number of each one's copy."""
        of_row, sizes, shares = self._classes
        rng = rng_for(self.seed, BALANCE, epoch)
        quotas = apportion(shares, rng)
        rows = rng.permutation(len(of_row))
        rows = rows[np.argsort(of_row[rows], kind="stable")]  # by class, random within it
        more = _ranges(sizes) < np.repeat(quotas % sizes, sizes)  # the first of every class
        times = np.repeat(quotas // sizes, sizes) + more
        return np.repeat(rows, times), _ranges(times)


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each size, concatenated."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
