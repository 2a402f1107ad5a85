"""The rows and random numbers of a step: functions of the seed, with the stated distributions."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from workbench import data
from workbench.data import DataError, sampler


def test_random_numbers_are_functions_of_their_place_and_never_overlap():
    places = [
        (seed, purpose, epoch, index, copy)
        for seed in (0, 1, 2**32 - 1)
        for purpose in range(6)
        for epoch in (0, 1)
        for index in (0, 1, 10**6)
        for copy in (0, 1, 2**16 - 1)
    ]
    heads = [tuple(data.rng_for(*place).integers(0, 2**63, 4)) for place in places]
    assert len(set(heads)) == len(places)
    assert tuple(data.rng_for(*places[7]).integers(0, 2**63, 4)) == heads[7]
    long = data.rng_for(0, data.DRAW, 0, 0).integers(0, 2**63, 10_000)
    for other in ((0, data.DRAW, 0, 1), (0, data.DRAW, 0, 0, 1)):
        assert not set(long) & set(data.rng_for(*other).integers(0, 2**63, 10_000))


def test_a_stream_does_not_depend_on_the_one_before():
    streams = sampler.Streams(7)
    for place in [(data.DRAW, 3, 17, 0), (data.DRAW, 3, 17, 2), (data.MIX, 0, 2**40, 9)]:
        a, b = streams(*place), data.rng_for(7, *place)
        for sample in (
            lambda rng: rng.random(3),
            lambda rng: rng.permutation(5),
            lambda rng: rng.integers(7, dtype=np.int32),  # leaves half a number behind
            lambda rng: rng.standard_normal(4),
        ):
            np.testing.assert_array_equal(sample(a), sample(b))


def test_step_seeds_differ_by_seed_step_and_rank():
    seeds = {data.step_seed(s, t, r) for s in range(3) for t in range(50) for r in range(3)}
    assert len(seeds) == 450 and all(0 <= s < 2**64 for s in seeds)


@pytest.mark.parametrize(
    "count, seed, batch_size, drop_last, copies, balance, digest",
    [
        (18, 3, 5, False, 1, 0.0, "3372de7ce1daccf4"),
        (18, 3, 5, True, 1, 0.0, "6c5a86b3abf03f05"),
        (1297, 0, 64, False, 1, 0.0, "39fa72d84ff33996"),
        (1297, 0, 64, False, 3, 0.0, "43f35e3225c4eff9"),
        (1000, 2**32 - 1, 256, True, 4, 0.0, "b1ff815abc481249"),
        (1000, 3, 256, False, 1, 0.5, "6f1b346c42375586"),
        (1000, 3, 256, False, 3, 1.0, "9cf95b6544245e28"),
    ],
)
def test_the_rows_of_a_step_never_change(
    count, seed, batch_size, drop_last, copies, balance, digest
):
    """With other rows an earlier run could not be repeated or resumed."""
    ours = data.Sampler(
        np.arange(count) ** 2 % 13,
        seed=seed,
        batch_size=batch_size,
        drop_last=drop_last,
        repeated_aug=copies,
        class_balanced_sampling=balance,
    )
    parts = [a for step in range(3 * ours.steps_per_epoch) for a in ours.rows(step)]
    assert all(a.dtype == np.int64 and not a.flags.writeable for a in parts)
    text = b"".join(a.astype("<i8").tobytes() for a in parts)
    assert hashlib.sha256(text).hexdigest()[:16] == digest
    purposes = (sampler.ORDER, data.DRAW, sampler.STEP, data.ERASE, data.MIX, sampler.BALANCE)
    assert purposes == tuple(range(6))


@pytest.mark.parametrize("count, batch_size, copies", [(18, 6, 3), (40, 16, 4), (23, 7, 2)])
def test_neighbours_among_repeated_images_are_different(count, batch_size, copies):
    rows, number = sampler.repeat(np.arange(count), count, batch_size, copies)
    assert len(rows) == len(number) == count and set(number) <= set(range(copies))
    for start in range(0, count, batch_size):
        step = rows[start : start + batch_size]
        assert all(step[i] != step[i + 1] for i in range(0, len(step) - 1, 2))
    assert len(set(zip(rows.tolist(), number.tolist(), strict=True))) == count


# ---- class balance


RARE = {0: 40, 3: 12, 4: 5, 9: 2, 70: 1}  # images of a label; 60 in all, labels with gaps


def labelled(sizes: dict[int, int]) -> np.ndarray:
    """Labels in no order."""
    labels = np.repeat(list(sizes), list(sizes.values()))
    return np.random.default_rng(5).permutation(labels)


def sampled(labels, epochs=range(1), **options) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and copies of whole epochs."""
    ours = data.Sampler(labels, **{"seed": 3, "batch_size": 7, **options})
    count = ours.steps_per_epoch
    for epoch in epochs:
        parts = [ours.rows(step) for step in range(epoch * count, (epoch + 1) * count)]
        rows, copies = map(np.concatenate, zip(*parts, strict=True))
        yield rows, copies


@pytest.mark.parametrize("balance", [0.0, 1e-9])
def test_without_balance_every_image_is_used_once(balance):
    labels = labelled(RARE)
    for epoch, (rows, copies) in enumerate(
        sampled(labels, range(3), class_balanced_sampling=balance)
    ):
        assert sorted(rows) == list(range(60)) and not copies.any()
        assert balance or rows.tolist() == data.epoch_permutation(3, epoch, 60).tolist()


@pytest.mark.parametrize("balance", [0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [RARE, {5: 17}, {0: 1, 1: 99}, {i: 1 + i * i % 23 for i in range(50)},
     {i: 3 for i in range(31)}],
    ids=["rare", "one class", "one of a hundred", "many", "equal"],
)  # fmt: skip
def test_classes_get_their_shares_and_their_images_are_used_equally_often(sizes, balance):
    labels = labelled(sizes)
    weights = {c: n ** (1 - balance) for c, n in sizes.items()}
    for rows, copies in sampled(labels, range(3), class_balanced_sampling=balance):
        assert len(rows) == len(copies) == len(labels)
        times = np.bincount(rows, minlength=len(labels))
        for c, weight in weights.items():
            own = times[labels == c]
            assert own.sum() > 0 and own.max() - own.min() <= 1
            assert abs(own.sum() - len(labels) * weight / sum(weights.values())) < 1
        for row in range(len(labels)):
            assert sorted(copies[rows == row]) == list(range(times[row]))


@pytest.mark.parametrize(
    "shares, whole",
    [
        ([1.5, 2.3, 0.2], [2, 2, 0]),
        ([0.4, 2.8, 2.8], [0, 3, 3]),
        ([0.7, 0.6, 0.6, 0.1], None),
        ([2.99999999999, 1.00000000001], [3, 1]),
        ([5.00000000001, 0.99999999999], [5, 1]),
        ([], []),
    ],
)
def test_the_largest_remainders_are_rounded_up(shares, whole):
    got = sampler.apportion(np.array(shares), np.random.default_rng(0)).tolist()
    assert got == whole or whole is None and got in ([1, 1, 0, 0], [1, 0, 1, 0])


def test_the_remainder_goes_to_every_class_equally_often():
    labels = labelled({0: 7, 1: 2, 2: 2})
    epochs = sampled(labels, range(2000), class_balanced_sampling=1.0)
    counts = np.array([np.bincount(labels[rows], minlength=3) for rows, _ in epochs])
    assert (np.sort(counts) == [3, 4, 4]).all()
    fewer = np.bincount(counts.argmin(1), minlength=3)
    assert stats.chisquare(fewer).pvalue > 1e-3


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_over_many_epochs_each_image_of_a_class_is_used_equally_often(balance):
    labels = labelled(RARE)
    epochs = sampled(labels, range(2000), class_balanced_sampling=balance)
    times = np.stack([np.bincount(rows, minlength=60) for rows, _ in epochs])
    for label in (0, 3, 4, 9):
        own = times[:, labels == label]
        size = own.shape[1]
        more = own.sum(axis=1) % size  # sampled without replacement: less spread than chi-square
        spread = (more * (size - more) / (size * (size - 1))).sum()
        if spread:
            square = ((own.sum(axis=0) - own.sum() / size) ** 2).sum() / spread
            assert 1e-3 < stats.chi2.sf(square, size - 1) < 1 - 1e-3
        else:
            assert len(set(own.ravel().tolist())) == 1


def test_every_position_of_a_balanced_epoch_is_equally_likely_for_every_class():
    labels = labelled(RARE)
    epochs = [labels[rows] for rows, _ in sampled(labels, range(1000), class_balanced_sampling=1.0)]
    for place in (0, 30, 59):
        counts = np.unique([epoch[place] for epoch in epochs], return_counts=True)[1]
        assert len(counts) == 5 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_an_order_is_a_function_of_seed_and_epoch_alone(balance):
    labels, how = labelled(RARE), dict(class_balanced_sampling=balance)
    orders = [tuple(r) for s in range(4) for r, _ in sampled(labels, range(4), seed=s, **how)]
    assert len(set(orders)) == 16
    assert len({tuple(sorted(rows)) for rows in orders}) == (16 if balance else 1)
    for size in (1, 8, 60, 100):
        rows = [tuple(rows) for rows, _ in sampled(labels, range(4), batch_size=size, **how)]
        assert rows == orders[12:]
    ours = data.Sampler(labels, seed=3, batch_size=7, **how)
    for step in (35, 2, 17, 8, 0):  # in any order
        part = slice(step % 9 * 7, step % 9 * 7 + 7)
        assert tuple(ours.rows(step)[0]) == orders[12 + step // 9][part]


def test_names_and_gaps_of_labels_do_not_matter():
    labels = labelled(RARE)
    dense = np.searchsorted(sorted(RARE), labels)
    epochs = [
        sampled(of, range(3), class_balanced_sampling=0.7) for of in (labels, dense, dense - 2)
    ]
    for first, *others in zip(*epochs, strict=True):
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("balance", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [7, 60, 61])
def test_drop_last_drops_the_incomplete_batch_and_nothing_else(batch_size, balance):
    how = dict(seed=0, batch_size=batch_size, class_balanced_sampling=balance)
    whole, dropping = (data.Sampler(labelled(RARE), **how, drop_last=d) for d in (False, True))
    assert dropping.steps_per_epoch == 60 // batch_size
    assert sum(len(whole.rows(step)[0]) for step in range(whole.steps_per_epoch)) == 60
    for epoch in range(2):
        for slot in range(dropping.steps_per_epoch):
            ours = dropping.rows(epoch * dropping.steps_per_epoch + slot)
            assert np.array_equal(ours, whole.rows(epoch * whole.steps_per_epoch + slot))
            assert len(ours[0]) == batch_size


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [7, 12, 100])
@pytest.mark.parametrize("balance", [0.3, 1.0])
def test_balance_and_repetition_together_use_no_copy_twice(copies, batch_size, balance):
    labels = labelled(RARE)
    how = dict(repeated_aug=copies, batch_size=batch_size, class_balanced_sampling=balance)
    for rows, number in sampled(labels, range(10), **how):
        assert len(rows) == 60
        assert len(set(zip(rows.tolist(), number.tolist(), strict=True))) == 60
        size = max(1, batch_size // copies)
        for start in range(0, 60 - size * copies + 1, size * copies):
            whole = slice(start, start + size * copies)
            turns, numbers = rows[whole].reshape(copies, -1), number[whole].reshape(copies, -1)
            assert (turns == turns[0]).all() and (numbers - numbers[0] == np.c_[:copies]).all()
            assert (numbers[0] % copies == 0).all()


def test_with_repetition_the_classes_are_used_equally_often_on_average():
    labels = labelled(RARE)
    epochs = sampled(labels, range(1000), repeated_aug=3, class_balanced_sampling=1.0)
    total = sum(np.bincount(labels[rows], minlength=71) for rows, _ in epochs)[list(RARE)]
    assert total.sum() == 60_000 and np.abs(total / 12_000 - 1).max() < 0.03


def test_a_class_too_rare_for_its_share_is_an_error_that_names_it():
    most, more = labelled({7: 1, 8: 2**17 - 1}), labelled({7: 1, 8: 2**17})
    rows, copies = next(sampled(most, class_balanced_sampling=1.0, batch_size=2**17))
    assert copies.max() == 2**16 - 1 and (most[rows] == 7).sum() == 2**16
    full = dict(seed=0, batch_size=8, class_balanced_sampling=1.0)
    for labels, copies in ((more, 1), (most, 2), (labelled({7: 2, 8: 2**18 - 1}), 1)):
        with pytest.raises(DataError, match="label 7 .* over 65,536 times an epoch"):
            data.Sampler(labels, **full, repeated_aug=copies)
    data.Sampler(labelled({7: 1, 8: 2**16 - 1}), **full, repeated_aug=2)
    data.Sampler(more, **{**full, "class_balanced_sampling": 0.9})
