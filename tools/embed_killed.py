"""`make embed-killed`: 10,000 images through `sait embed`, killed three times in the middle and gone on, and by Ray.

Half of the images are crops of scikit-learn's photos, half are generated, three are broken. The rows must be those of a
run that nobody disturbed: every key once, bit for bit. Exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from sait.data.photos import sample_photos
from sait.embed import read

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "sait-canvas.safetensors"
BROKEN = (b"", b"no image")


def write_images(folder: Path, count: int) -> None:
    """So many JPEGs of 60 to 400 pixels, a thousand to a folder, and the broken ones."""
    photos, chance, noise = list(sample_photos().values()), random.Random(0), np.random.default_rng(0)
    for i in range(count):
        if i % 2:
            photo, side = photos[i // 2 % 2], chance.randint(60, 400)
            left, top = chance.randint(0, photo.width - side), chance.randint(0, photo.height - side)
            image = photo.crop((left, top, left + side, top + side))
        else:
            slope = np.linspace(0, 255, 96)[:, None] * noise.random(3)
            image = Image.fromarray((slope + noise.integers(0, 60, (80, 96, 3))).clip(0, 255).astype(np.uint8))
        place = folder / f"{i // 1000:02d}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:05d}.jpg")
    truncated = next(folder.rglob("*.jpg")).read_bytes()[:700]
    for i, data in enumerate((*BROKEN, truncated)):
        (folder / f"broken{i}.jpg").write_bytes(data)


def begin(source: Path, out: Path, part: int, more: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "sait_cli", "embed", source, "--out", out, "--model", CHECKPOINT, "--mass", "0.9"]
    return subprocess.Popen([*words, "--part", str(part), *more])


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        sys.exit(f"embed_killed: sait embed ended with exit code {process.returncode}")


def parts_in(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def kill(process: subprocess.Popen[bytes], out: Path, enough: int, chance: random.Random) -> None:
    """With SIGKILL, some time after so many parts are there."""
    while parts_in(out) < enough and process.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed with {parts_in(out)} parts", flush=True)


def same_rows(got: pa.Table, want: pa.Table) -> bool:
    """Bit for bit, and NaN is NaN."""

    def numbers(table: pa.Table) -> np.ndarray:
        return table["embedding"].combine_chunks().flatten().to_numpy().view(np.int32)

    others = [name for name in want.column_names if name != "embedding"]
    return got.select(others).equals(want.select(others)) and np.array_equal(numbers(got), numbers(want))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--part", type=int, default=512, help="images of a Parquet file")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args(arguments)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        source, whole, killed, by_ray = (Path(folder) / name for name in ("images", "whole", "killed", "ray"))
        write_images(source, options.images)
        finish(begin(source, whole, options.part))
        parts = parts_in(whole)
        for number in range(1, options.kills + 1):
            kill(begin(source, killed, options.part), killed, parts * number // (options.kills + 1), chance)
        finish(begin(source, killed, options.part))
        want = read(whole)
        found = {"killed and gone on": killed}
        if not options.no_ray:
            finish(begin(source, by_ray, options.part, ["--engine", "ray", "--actors", "2"]))
            found["two actors of Ray"] = by_ray
        keys = want["key"].to_pylist()
        expected = len(keys) == len(set(keys)) == options.images + len(BROKEN) + 1
        failed = sum(error is not None for error in want["error"].to_pylist())
        print(f"{len(keys)} rows, each key {'once' if expected else 'NOT once'}, {failed} with an error")
        verdicts = {name: same_rows(read(out), want) for name, out in found.items()}
        for name, same in verdicts.items():
            print(f"{name}: {'the same rows, bit for bit' if same else 'OTHER ROWS'}")
    sys.exit(0 if expected and all(verdicts.values()) else 1)


if __name__ == "__main__":
    main()
