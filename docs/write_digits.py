"""Write scikit-learn's handwritten digits as a data set, in the three forms that task=dataset reads from a disk.

    python docs/write_digits.py digits

    digits/train.jsonl, test.jsonl       rows with the paths of PNG files in digits/images
    digits/train.parquet, test.parquet   the same rows with the bytes of the PNG files
    digits/hf                            the same rows as a folder of `save_to_disk` with the splits train and test

The last 297 of the 1,797 digits are the test rows: other people wrote them. The scans have 8 x 8 pixels and are drawn
with 32 x 32.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "Which digit is this?"
TRAIN_ROWS = 1500
SIDE = 32


def write_digits(folder: Path) -> None:
    """Write all three forms into `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    rows = [
        {"question": QUESTION, "image": f"images/{number:04d}.png", "answer": str(label)}
        for number, label in enumerate(digits.target)
    ]
    for row, pixels in zip(rows, digits.images, strict=True):
        (folder / row["image"]).write_bytes(png_of(pixels))
    splits = {"train": rows[:TRAIN_ROWS], "test": rows[TRAIN_ROWS:]}
    features = Features({"question": Value("string"), "image": ImageFeature(), "answer": Value("string")})
    built = DatasetDict()
    for split, of_split in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
        with_bytes = [row | {"image": {"bytes": (folder / row["image"]).read_bytes()}} for row in of_split]
        built[split] = Dataset.from_list(with_bytes, features=features)
        built[split].to_parquet(folder / f"{split}.parquet")
    built.save_to_disk(folder / "hf")


def png_of(scan: np.ndarray) -> bytes:
    """A scan, float [8, 8] from 0 to 16, as a grey PNG."""
    grey = Image.fromarray(np.round(scan * 255 / 16).astype(np.uint8))
    file = io.BytesIO()
    grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, format="PNG")
    return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as a data set.")
    parser.add_argument("folder", type=Path)
    write_digits(parser.parse_args().folder)
