"""Images of object stores are kept on a disk, within a limit, and are never other bytes."""

import multiprocessing
import os
import random
from pathlib import Path

import pytest

from workbench import shard_cache
from workbench.shard_cache import ShardCache
from workbench.shard_store import StoreError

MB = 10**6
SHARDS = {f"s3://bucket/{n}.tar": (4 * MB, f'"etag {n}"') for n in range(3)}
URL, SHARD = next(iter(SHARDS.items()))


def opened(folder: Path, limit: int = 100 * MB, shards=SHARDS) -> ShardCache:
    return shard_cache.opened(folder / "cache", limit, shards)


def content(place: int, size: int = 50_000) -> bytes:
    return random.Random(place).randbytes(size)


def fill(cache: ShardCache, shards, places=range(60)) -> int:
    """Puts the images of these shards, 64 kB apart, and returns how many are kept."""
    kept = 0
    for url, shard in shards.items():
        for i in places:
            cache.put(url, 512 + 2**16 * i, 50_000, shard, content(i))
            kept += cache.get(url, 512 + 2**16 * i, 50_000, shard) is not None
    return kept


def used(cache: ShardCache) -> int:
    """Bytes on the disk, as du counts them."""
    return sum(path.stat().st_blocks * 512 for path in Path(cache.folder).glob("*.shard"))


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 50_000])
def test_bytes_come_back_from_their_own_place_and_version_alone(tmp_path, size):
    """Members of a tar that follow each other at once, as its format places them."""
    cache, places, start = opened(tmp_path), [], 512
    for _ in range(20):
        places.append(start)
        start += -(-size // 512) * 512 + 512
    random.Random(0).shuffle(places)
    for place in places:
        assert cache.get(URL, place, size, SHARD) is None
        cache.put(URL, place, size, SHARD, content(place, size))
    other = next(url for url in SHARDS if url != URL)
    for place in places:
        assert cache.get(URL, place, size, SHARD) == content(place, size)
        assert opened(tmp_path).get(URL, place, size, SHARD) == content(place, size)
        assert cache.get(URL, place, size + 1, SHARD) is None
        assert cache.get(URL, place, size, (4 * MB, '"other etag"')) is None
        assert cache.get(other, place, size, SHARD) is None


def test_damaged_bytes_are_not_given_out_and_can_be_replaced(tmp_path):
    cache = opened(tmp_path)
    cache.put(URL, 512, 50_000, SHARD, content(0))
    [path] = Path(cache.folder).glob("*.shard")
    whole = path.read_bytes()
    for place in [480, 487, 490, 512, 20_000, 50_511]:  # size, checksum, content
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get(URL, 512, 50_000, SHARD) is None
    path.write_bytes(whole[:30_000])  # a process was killed, or the power went
    assert cache.get(URL, 512, 50_000, SHARD) is None
    cache.put(URL, 512, 50_000, SHARD, content(0))
    assert cache.get(URL, 512, 50_000, SHARD) == content(0)


def test_the_folder_stays_within_its_limit_and_keeps_what_it_has(tmp_path):
    cache = opened(tmp_path, limit=2 * MB)
    kept = fill(cache, SHARDS)
    assert 30 <= kept < 40 and 1.6 * MB < used(cache) <= 2 * MB
    again = opened(tmp_path, limit=2 * MB)
    assert fill(again, SHARDS) == kept and used(again) <= 2 * MB


def test_shards_of_other_data_make_room_the_oldest_use_first(tmp_path):
    old, new, third = ({f"s3://{name}/0.tar": SHARD} for name in ("old", "new", "third"))
    for shards in (old, new):
        assert fill(opened(tmp_path, 8 * MB, shards), shards) == 60
        for path in (tmp_path / "cache").glob("*.shard"):  # an hour passes
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    opened(tmp_path, 8 * MB, old)  # is used again
    cache = opened(tmp_path, 8 * MB, third)
    assert fill(cache, third) == 60 and used(cache) <= 8 * MB
    assert cache.get("s3://old/0.tar", 512, 50_000, SHARD) == content(0)
    assert cache.get("s3://new/0.tar", 512, 50_000, SHARD) is None


def test_a_lower_limit_removes_files_of_the_same_data(tmp_path):
    fill(opened(tmp_path), SHARDS)
    cache = opened(tmp_path, limit=5 * MB)
    assert 0 < used(cache) <= 5 * MB


def write(cache: ShardCache, seed: int) -> None:
    order = list(range(60))
    random.Random(seed).shuffle(order)
    fill(cache, SHARDS, order)


def test_several_processes_write_and_read_one_cache(tmp_path):
    cache = opened(tmp_path, limit=5 * MB)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write, args=(cache, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert used(cache) <= 5 * MB
    found = [
        cache.get(url, 512 + 2**16 * i, 50_000, shard)
        for url, shard in SHARDS.items()
        for i in range(60)
    ]
    assert sum(one is not None for one in found) > 70
    assert all(one in (None, content(i % 60)) for i, one in enumerate(found))


def test_a_folder_that_cannot_be_used_and_a_disk_too_small_are_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(StoreError, match=r"shard_cache_gb: .* cannot be used \(File exists\)"):
        opened(tmp_path)
    huge = {URL: (10**18, '"e"')}
    with pytest.raises(StoreError, match=r"1000000000.0 GB more are to come, and .* free"):
        opened(tmp_path / "other", limit=10**19, shards=huge)
