"""Large sets: time and private memory to open 14.2 million images and to read the first batch, the
order of 10^9 images, and images per second from files, from local shards and from S3.

    python benchmarks/scale.py [--images 14200000] [--no-s3]

The index has every image of one shard under 14,200 names of it. Private memory (USS) is what a
process has for itself: pages of the mapped index are shared.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

os.environ["WORKBENCH_CACHE"] = tempfile.mkdtemp()

from PIL import Image  # noqa: E402

from workbench import data, runs, training  # noqa: E402
from workbench.recipe import Recipe  # noqa: E402
from workbench.training.inputs import open_shard_cache, train_batches  # noqa: E402

ROOT = Path(__file__).parents[1]
META = b"workbench.index"


def uss() -> float:
    """Private memory of this process in MB."""
    return psutil.Process().memory_full_info().uss / 1e6


def photographs(count: int) -> list[bytes]:
    """JPEGs of about 50 kB, 400 x 300 pixels."""
    found = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (75, 100, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(out, "JPEG")
        found.append(out.getvalue())
    return found


def pack(path: Path, content: list[bytes], start: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(content, start):
            for end, part in (("jpg", image), ("cls", str(i % 10).encode())):
                info = tarfile.TarInfo(f"{i:09d}.{end}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))


def text(value: str) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())


def simulate(where: str, number: str) -> None:
    """An index of this many images, as write_index writes it, of links to one shard."""
    folder, images = Path(where), int(number)
    pack(folder / "one.tar", photographs(1000))
    data.write_index([str(folder / "one.tar")], folder / "one.arrow", progress=False)
    one = pa.ipc.open_file(str(folder / "one.arrow")).read_all()
    meta = json.loads(one.schema.metadata[META])
    [(url, shard)] = meta["shards"].items()
    count = images // 1000
    names = [str(folder / f"{n:05d}.tar") for n in range(count)]
    for name in names:
        os.link(url, name)
    shard_of = pa.array(np.repeat(np.arange(count), 1000))
    numbers = pc.cast(pa.array(np.arange(images)), pa.large_string())
    file = pc.binary_join_element_wise(numbers, text(".jpg"), text(""))
    tail = pa.array(
        [p.partition("::")[2] for p in one["path"].to_pylist()] * count, pa.large_string()
    )
    shard_of = pa.array(names, pa.large_string()).take(shard_of)
    path = pc.binary_join_element_wise(shard_of, tail, text("::"))
    label = pa.array((np.arange(images) * 2654435761 % 21_843).astype(np.int16))
    meta["shards"] = dict.fromkeys(names, shard)
    table = pa.table({"file": file, "label": label, "path": path}).combine_chunks()
    table = table.replace_schema_metadata({META: json.dumps(meta)})
    with pa.ipc.new_file(str(folder / "large.arrow"), table.schema) as out:
        out.write_table(table)


def open_and_read(folder: str) -> None:
    """In a process of its own: opens the index and reads the first batch of two workers."""
    lists = {"train_list": "large.arrow", "val_list": "one.arrow"}
    recipe = Recipe(dataset="files", data_dir=folder, image_size=64, val_resize=64, **lists)
    before, start = uss(), time.perf_counter()
    content = data.load_dataset(recipe)
    opened, private = time.perf_counter() - start, uss() - before
    data.fingerprint(content)
    batches = train_batches(recipe.replace(batch_size=256), content, range(10), workers=2)
    batch = next(batches)
    first = time.perf_counter() - start
    workers = [p.memory_full_info().uss / 1e6 for p in psutil.Process().children()]
    size = (Path(folder) / "large.arrow").stat().st_size / 1e9
    print(f"{len(content.train):,} images, an index of {size:.2f} GB")
    print(f"  opened in {opened:.2f} s, {private:.0f} MB private ({before:.0f} MB before)")
    print(f"  first batch of {len(batch.labels)} after {first:.2f} s, {uss() - before:.0f} MB more")
    print(f"  workers: {', '.join(f'{mb:.0f} MB' for mb in workers)} private", flush=True)
    batches.close()
    start = time.perf_counter()
    data.check_shards(content.train)
    print(
        f"  {len(content.train) // 1000:,} shards checked in {time.perf_counter() - start:.2f} s",
        flush=True,
    )


def billion() -> None:
    """In a process of its own: the order of 10^9 images."""
    before, start = uss(), time.perf_counter()
    order = data.Sampler(range(10**9), seed=0, batch_size=4096)
    order.rows(0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for step in range(1, 101):
        order.rows(step * 2000)
    each = (time.perf_counter() - start) / 100
    print(
        f"10^9 images: first batch of 4096 rows after {1e3 * first:.1f} ms, {1e3 * each:.2f} ms a "
    )
    print(f"  batch, {uss() - before:.1f} MB private", flush=True)


def speeds(folder: Path, s3: bool) -> None:
    """images per second of one training from files, local shards and S3, taken in turns."""
    images, count = photographs(1024), 8
    (folder / "files").mkdir()
    rows = []
    for i, image in enumerate(images):
        (folder / "files" / f"{i:09d}.jpg").write_bytes(image)
        rows.append(f"{i:09d}.jpg {i % 10}\n")
    (folder / "train.txt").write_text("".join(rows))
    size = len(images) // count
    for n in range(count):
        pack(folder / f"shard-{n:05d}.tar", images[n * size : (n + 1) * size], n * size)
    data.write_index([str(folder / "shard-*.tar")], folder / "local.arrow", progress=False)
    kinds = {"files": "train.txt", "local": "local.arrow"}
    if s3:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "data" / "shard_server.py")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        upload(server.stdout.readline().strip(), folder)
        kinds |= {"s3": "s3.arrow", "s3, kept on the disk": "s3.arrow"}
    try:
        seconds = {kind: [] for kind in kinds}
        for turn in range(4):  # the first warms up, and fills the cache
            for kind in kinds if turn else [k for k in kinds if k[:2] != "s3" or "kept" in k]:
                seconds[kind].append(read_all(recipe(folder, kind, kinds[kind]), len(images)))
        rates = {kind: len(images) / np.median(found[-3:]) for kind, found in seconds.items()}
        print(
            "loader alone, 2 workers: " + ", ".join(f"{k} {r:.0f} img/s" for k, r in rates.items())
        )
        ratios = np.array(seconds["files"][1:]) / np.array(seconds["local"][1:])
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"  local shards / files: {np.median(ratios):.3f} (turns: {each})")
        for kind, name in kinds.items():
            run = trained(recipe(folder, kind, name))
            steps = run.steps().iloc[1:]
            print(f"training from {kind}: {steps.images_per_second.median():.0f} img/s, ", end="")
            print(f"{100 * steps.data_wait.mean():.1f} % of the time waiting", flush=True)
    finally:
        if s3:
            server.kill()
            server.communicate()


def upload(url: str, folder: Path) -> None:
    import boto3

    values = {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}
    os.environ |= {f"AWS_{k}": v for k, v in {**values, "ENDPOINT_URL": url}.items()}
    client = boto3.client("s3")
    client.create_bucket(Bucket="bench")
    for path in sorted(folder.glob("shard-*.tar")):
        client.put_object(Bucket="bench", Key=path.name, Body=path.read_bytes())
    data.write_index(["s3://bench/shard-*.tar"], folder / "s3.arrow", progress=False)


def recipe(folder: Path, kind: str, name: str) -> Recipe:
    cache = {"shard_cache_gb": 1.0, "cache_dir": str(folder / "cache")}
    return Recipe(
        name=kind, dataset="files", data_dir=str(folder), train_list=name, train_root="files",
        val_list=name, val_root="files", image_size=128, val_resize=128, crop_scale=[0.08, 1.0],
        hflip=0.5, batch_size=64, epochs=1, workers=2, model="resnet10t", log_every=4,
        runs_dir=str(folder / "runs"), verify_data=kind != "files",
        **(cache if kind.endswith("kept on the disk") else {}),
    )  # fmt: skip


def read_all(one: Recipe, images: int) -> float:
    """Seconds for all images, decoded and augmented, from the first batch on."""
    content = data.load_dataset(one)
    open_shard_cache(one, content)
    batches = train_batches(one, content, range(images // 64 + 4), workers=2)
    for _ in range(4):  # the workers start
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def trained(one: Recipe) -> runs.Run:
    run = runs.Run(one.folder)
    for _ in training.fit(one.replace(log_every=1, image_size=64), run):
        pass
    return run


PARTS = {"simulate": simulate, "open": open_and_read, "billion": billion}


def alone(part: str, *arguments: str) -> None:
    """A part in a process that has nothing but the imports."""
    subprocess.run([sys.executable, __file__, "--part", part, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=14_200_000)
    parser.add_argument("--no-s3", action="store_true", help="without moto's server")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        return PARTS[given.part[0]](*given.part[1:])
    with tempfile.TemporaryDirectory() as folder:
        alone("simulate", folder, str(given.images))
        alone("open", folder)
        alone("billion")
    with tempfile.TemporaryDirectory() as folder:
        speeds(Path(folder), not given.no_s3)


if __name__ == "__main__":
    main()
