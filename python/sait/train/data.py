"""Batches to train on and held-out ones: Canvas, Stamps, or a folder of images through timm's loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from timm.data import create_dataset, create_loader, get_img_extensions, resolve_model_data_config
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DistributedSampler, Subset

from sait.data import canvas, stamps
from sait.data.debian import PackageError
from sait.train.config import Config, TrainingError
from sait.train.processes import Processes

Batch = tuple[Tensor, Tensor]  # (B, 3, height, width) float32, (B,) int64


class Expected(NamedTuple):
    """What a model expects of an image."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


class Half(NamedTuple):
    """Some of a folder's held-out images, drawn by a seed: those of two halves have none in common.

    Attributes:
        number: 0 or 1.
        most: images, at most.
        seed: that draws.
    """

    number: int
    most: int
    seed: int

    def of(self, images: int) -> list[int]:
        """Which of so many, ascending."""
        drawn = torch.randperm(images, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return sorted(drawn[self.number :: 2][: self.most])


class Data(Protocol):
    """Where batches come from; every process gets its own share.

    Attributes:
        steps: batches of an epoch.
        held_out_images: of the held-out set, over all processes.
    """

    steps: int
    held_out_images: int

    def train_batches(self, epoch: int) -> Iterator[Batch]: ...

    def held_out_batches(self) -> Iterator[Batch]: ...


def expected_by(model: Any) -> Expected:
    config = resolve_model_data_config(model)
    side = model.patch_embed.img_size or config["input_size"][1:]
    return Expected((3, *side), config["mean"], config["std"], config["interpolation"], config["crop_pct"])


def class_names(data: str) -> list[str]:
    """What there is to tell apart; TrainingError if there is no such data."""
    if data == "canvas":
        return [str(digit) for digit in range(canvas.CLASSES)]
    if data == "stamps":
        return list(stamps.CLASSES)
    folders = _split_folders(data)
    for folder in folders:
        if not _has_image(folder):
            raise TrainingError(f"--data: {folder}: expected a folder of images for each class, found no image.")
    train, val = map(_classes, folders)
    if train != val:
        alone = sorted(set(train) ^ set(val))
        raise TrainingError(
            f"--data: {data}: expected the same classes in train and val, got {len(train)} and {len(val)}; "
            f"in one of them only: {', '.join(alone[:3])}."
        )
    empty = next((name for name in train if not _has_image(folders[0] / name)), None)
    if empty is not None:
        raise TrainingError(f"--data: {folders[0] / empty}: found no image; expected some of every class.")
    return train


def open_data(
    config: Config,
    expected: Expected,
    processes: Processes,
    *,
    for_training: bool = True,
    held_out: str = "validation",
    half: Half | None = None,
) -> Data:
    """The data of a config. TrainingError if it is missing, empty or too small.

    Args:
        for_training: an epoch must have a batch.
        held_out: "validation", for all that is chosen by what it shows, or "test", for what is then claimed. Folders
            have only one held-out set, their val/.
        half: of a folder: only these of its held-out images.
    """
    if config.batch % processes.world_size:
        raise TrainingError(
            f"config: batch: expected a multiple of the {processes.world_size} processes, got {config.batch}."
        )
    data: Data
    if config.data == "canvas":
        data = CanvasData(config, expected, processes, held_out)
    elif config.data == "stamps":
        data = StampsData(config, expected, processes, held_out)
    else:
        data = FolderData(config, expected, processes, half)
    if for_training and data.steps == 0:
        raise TrainingError(f"--data: {config.data}: an epoch has fewer images than a batch of {config.batch}.")
    return data


class DrawnData:
    """New images in every epoch, decided by seed and epoch: the placements are the augmentation."""

    cure: str  # of a size that the data set does not have

    def sizes(self) -> tuple[int, int]:
        """Images of an epoch, and of the held-out set."""
        raise NotImplementedError

    def drawn(self, split: str, size: int, seed: int | tuple[int, int]) -> canvas.Canvas | stamps.Stamps:
        """The data set; the seed is (seed, epoch) in training."""
        raise NotImplementedError

    def __init__(self, config: Config, expected: Expected, processes: Processes, held_out: str) -> None:
        _, height, width = expected.size
        if height != width:
            raise TrainingError(f"--data: {config.data} has square images, and the model expects {height} x {width}.")
        self.config, self.processes = config, processes
        self.look: dict[str, Any] = {"img_size": height, "mean": expected.mean, "std": expected.std}
        images, self.held_out_images = self.sizes()
        self.steps = images // config.batch
        try:
            self.held_out = self.drawn(held_out, self.held_out_images, 0)
        except ValueError as error:
            raise TrainingError(f"--data: {error} {self.cure}") from error
        except PackageError as error:
            raise TrainingError(f"--data: {error}") from error

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """The same global batches for any number of processes, each of which takes every world_size-th image."""
        rank, world = self.processes.rank, self.processes.world_size
        images = self.drawn("train", self.steps * self.config.batch, (self.config.seed, epoch))
        yield from images.batches(self.config.batch // world, rank=rank, world_size=world)

    def held_out_batches(self) -> Iterator[Batch]:
        rank, world = self.processes.rank, self.processes.world_size
        yield from self.held_out.batches(self.config.batch // world, rank=rank, world_size=world)


class CanvasData(DrawnData):
    """Canvas: digits on dimmed photos."""

    cure = "Set model_kwargs={img_size: 64, patch_size: 8}."

    def sizes(self) -> tuple[int, int]:
        return self.config.canvas_images, self.config.canvas_eval_images

    def drawn(self, split: str, size: int, seed: int | tuple[int, int]) -> canvas.Canvas:
        return canvas.Canvas(split, size, seed, **self.look)


class StampsData(DrawnData):
    """Stamps: photographed objects on photographs."""

    cure = "Set model_kwargs={img_size: 168}."

    def sizes(self) -> tuple[int, int]:
        return self.config.stamps_images, self.config.stamps_eval_images

    def drawn(self, split: str, size: int, seed: int | tuple[int, int]) -> stamps.Stamps:
        return stamps.Stamps(split, size, seed, fold=self.config.fold, **self.look)


class FolderData:
    """train/ and val/ of a folder, with a folder for each class in both."""

    def __init__(self, config: Config, expected: Expected, processes: Processes, half: Half | None = None) -> None:
        train, val = _split_folders(config.data)
        # Left to itself, timm numbers the classes of each folder by the images it finds there.
        classes = {name: i for i, name in enumerate(class_names(config.data))}
        device = torch.device(processes.device)
        common: dict[str, Any] = {
            "input_size": expected.size,
            "batch_size": config.batch // processes.world_size,
            "interpolation": expected.interpolation,
            "mean": expected.mean,
            "std": expected.std,
            "num_workers": config.workers,
            "device": device,
            "use_prefetcher": device.type == "cuda",
            "pin_memory": device.type == "cuda",
            # Workers that live on would carry their random state from epoch to epoch, where a resumed run has none.
            "persistent_workers": False,
        }
        self.train = create_loader(
            create_dataset("", root=str(train), is_training=True, class_map=classes),
            is_training=True,
            distributed=processes.world_size > 1,
            scale=(config.crop_scale[0], config.crop_scale[1]),
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
            **common,
        )
        images = create_dataset("", root=str(val), class_map=classes)
        wanted = range(len(images)) if half is None else half.of(len(images))
        self.steps, self.held_out_images = len(self.train), len(wanted)
        # timm's own sampler repeats images until all processes have equally many, and then counts them twice.
        share: Any = Shard(images, wanted[processes.rank :: processes.world_size])
        self.held_out = create_loader(share, crop_pct=expected.crop_pct, **common)

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        sampler: Any = self.train.sampler
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        yield from self.train

    def held_out_batches(self) -> Iterator[Batch]:
        yield from self.held_out


class Shard(Subset[Any]):
    """Some images of a timm data set, through which its loader sets their transform."""

    dataset: Any

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def _split_folders(data: str) -> tuple[Path, Path]:
    root = Path(data)
    if not root.is_dir():
        raise TrainingError(f"--data: there is no folder {data}; expected one with train/ and val/, or canvas.")
    found = []
    for names in (("train",), ("val", "validation", "test")):
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            raise TrainingError(f"--data: {data}: expected the folders train and val in it; {names[0]} is missing.")
        found.append(folder)
    return found[0], found[1]


def _classes(folder: Path) -> list[str]:
    """The folder's folders, in timm's order."""
    return sorted((path.name for path in folder.iterdir() if path.is_dir()), key=natural_key)


def _has_image(folder: Path) -> bool:
    endings = get_img_extensions(as_set=True)
    return any(path.suffix.lower() in endings for path in folder.rglob("*"))
