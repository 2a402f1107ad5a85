"""Answers for picture files, with onnxruntime and Pillow alone.

python predict.py [model_int8.onnx] PICTURE ...     prints file, best class, probability
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).parent


def rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB, white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(image: Image.Image, seen: dict) -> np.ndarray:
    """The network's input (1, 3, size, size): short side to `resize`, the centre, normalised."""
    sides, size = np.array(image.size), seen["size"]
    resized = (seen["resize"] * sides / sides.min()).astype(int)
    first = np.round((resized - size) / 2)
    # Only what the centre shows is resized: its box in pixels of the picture.
    box = [*(first * (sides / resized)), *((first + size) * (sides / resized))]
    image = image.resize((size, size), Image.Resampling[seen["interpolation"].upper()], box)
    pixels = np.asarray(image).transpose(2, 0, 1)[None]
    if seen["normalised_inside"]:
        return pixels
    mean, std = (255 * np.array(seen[k], np.float32).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    return (pixels - mean) / std


def main(words: list[str]) -> None:
    """Prints file, best class and its probability, a line each; of a bad file what is wrong."""
    if not words or words[0].startswith("-"):
        sys.exit(__doc__)
    network = words.pop(0) if words[0].endswith(".onnx") else "model.onnx"
    meta = json.loads((HERE / "meta.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(HERE / network, providers=["CPUExecutionProvider"])
    for path in words:
        try:
            with Image.open(path) as image:
                data = prepare(rgb(image), meta["preprocess"])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(path, "", f"error: {error}", sep="\t")
            continue
        [score] = session.run(["score"], {"data": data})[0]
        print(path, meta["classes"][score.argmax()], f"{score.max():.6f}", sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
