"""Write scikit-learn's handwritten digits as a data set, in the three forms that task=dataset reads from a disk.

    python docs/write_digits.py digits

    digits/train.jsonl, test.jsonl       rows with the paths of PNG files in digits/images
    digits/train.parquet, test.parquet   the same rows with the bytes of the PNG files
    digits/hf                            the same rows as a folder of `save_to_disk` with the splits train and test

The last 297 of the 1,797 scans are the test rows: other people wrote them. The scans have 8 x 8 pixels and are drawn
with 32 x 32. Each of the other 1,500 is drawn eight times: as it is, and seven times turned by up to 5 degrees and
moved by up to half a pixel of the scan, because 1,500 pictures are few.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "Which digit is this?"
TRAIN_SCANS = 1500
DRAWINGS = 8
SIDE = 32
LARGEST_TURN_DEGREES = 5
LARGEST_MOVE = 2
"""In pixels of the picture, to each side; a pixel of the scan has four."""


def write_digits(folder: Path) -> None:
    """Write all three forms into `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if number < TRAIN_SCANS else "test"
        for drawing in range(DRAWINGS if split == "train" else 1):
            image = f"images/{number:04d}_{drawing}.png"
            draw(scan, number, drawing).save(folder / image)
            splits[split].append({"question": QUESTION, "image": image, "answer": str(label)})
    features = Features({"question": Value("string"), "image": ImageFeature(), "answer": Value("string")})
    built = DatasetDict()
    for split, of_split in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
        with_bytes = [row | {"image": {"bytes": (folder / row["image"]).read_bytes()}} for row in of_split]
        built[split] = Dataset.from_list(with_bytes, features=features)
        built[split].to_parquet(folder / f"{split}.parquet")
    built.save_to_disk(folder / "hf")


def draw(scan: np.ndarray, number: int, drawing: int) -> Image.Image:
    """A scan, float [8, 8] from 0 to 16, as a grey picture. Drawing 0 is the scan as it is."""
    grey = Image.fromarray(np.round(scan * 255 / 16).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if drawing == 0:
        return grey
    random = np.random.default_rng((number, drawing))
    angle = random.uniform(-LARGEST_TURN_DEGREES, LARGEST_TURN_DEGREES)
    right, down = random.uniform(-LARGEST_MOVE, LARGEST_MOVE, 2)
    return grey.rotate(angle, Image.Resampling.BICUBIC, translate=(right, down))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as a data set.")
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
