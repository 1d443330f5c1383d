"""Small images in every kind of source, and a model that is small enough to embed them in a moment."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sait
import timm
import torch
from PIL import Image

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
TOKENS = 17  # of a 4 x 4 grid and a class token
NAME = "vit_tiny_patch16_224"


def small(keep: float | None = None, mass: float | None = None, **changes: Any) -> Any:
    """A sparse model with the same weights at every call; without keep and mass it is dense."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **{**SMALL, **changes}).eval()
    for block in model.blocks:  # random weights attend uniformly; these do not, so that images keep different numbers
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    sait.sparsify(model, block=1, keep=1.0)
    return sait.set_density(model, keep=keep, mass=mass)


def encoded(i: int, kind: str = "PNG") -> bytes:
    """The file of picture ``i``: noise of many sizes, whose pixels differ from picture to picture."""
    chance = np.random.default_rng(i)
    pixels = chance.integers(0, 256, (20 + i % 30, 25 + i % 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def folder(at: Path, images: int) -> Path:
    """Of PNG and JPEG files, half of them a folder deeper."""
    (at / "deeper").mkdir(parents=True)
    for i in range(images):
        suffix, kind = (".png", "PNG") if i % 3 else (".jpg", "JPEG")
        (at / ("deeper" if i % 2 else "") / f"{i:03d}{suffix}").write_bytes(encoded(i, kind))
    return at


def tar(at: Path, images: range) -> Path:
    with tarfile.open(at, "w") as shard:
        for i in images:
            for suffix, data in ((".png", encoded(i)), (".txt", b"what it shows")):
                member = tarfile.TarInfo(f"{i:03d}{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return at


def same_rows(one: pa.Table, other: pa.Table) -> bool:
    """Bit for bit; NaN is NaN."""
    if not one.drop_columns("embedding").equals(other.drop_columns("embedding")):
        return False
    embeddings = [table["embedding"].combine_chunks().values.to_numpy() for table in (one, other)]
    return embeddings[0].tobytes() == embeddings[1].tobytes()


def parquet(at: Path, columns: dict[str, Any], rows_of_group: int = 3) -> Path:
    pq.write_table(pa.table(columns), at, row_group_size=rows_of_group)
    return at
