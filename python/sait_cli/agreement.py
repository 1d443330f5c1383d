"""``sait tune --agreement``: how few tokens a user's own images need, without a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sait_cli import options
from sait_cli.options import DType

if TYPE_CHECKING:
    import torch
    from sait.calibrate import Calibration
    from sait.methods import Plan
    from torch import Tensor

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def are_images(path: str) -> bool:
    """Whether a word of the command line is a picture or a folder, and no model."""
    return Path(path).is_dir() or Path(path).suffix.lower() in ENDINGS


def files_in(paths: Sequence[Path]) -> list[Path]:
    """The pictures themselves, and those in the folders, by name."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not inside:
            options.bad("IMAGES", f"expected pictures ({', '.join(ENDINGS)}) in {path}, found none.")
        found += inside
    return found


def batches(
    files: Sequence[Path], expected: Any, batch: int, place: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """(B, 3, height, width), opened as they are needed."""
    import torch
    from sait.data.photos import to_tensor

    for start in range(0, len(files), batch):
        photos = [options.open_photo(path) for path in files[start : start + batch]]
        yield torch.stack([to_tensor(photo, expected) for photo in photos]).to(place, dtype)


def calibrate(
    model: Any,
    described: str,
    files: Sequence[Path],
    plans: Sequence[Plan],
    *,
    agreement: float,
    batch: int,
    dtype: DType,
    place: torch.device,
    repeats: int,
    json: Path | None,
) -> None:
    """Measures, prints, and writes the figures."""
    import sait
    from sait.bench import measure

    expected = options.preprocessing(model)
    subject = model.to(place, dtype.as_torch())
    pictures = batches(files, expected, batch, place, dtype.as_torch())
    with options.progress() as bar:
        task = bar.add_task("comparing", total=-(-len(files) // batch) * len(plans))
        found = sait.calibrate(
            *(subject, pictures), agreement=agreement, plans=plans, repeats=repeats, advance=lambda: bar.advance(task)
        )
    console = Console(highlight=False)
    console.print(f"{described}; {found.images} images, batch {min(batch, found.images)}, {dtype}", soft_wrap=True)
    console.print(table(found))
    console.print(verdict(found, agreement), soft_wrap=True)
    if json is not None:
        measure.save(measure.results(rows(found), place, model=described, dtype=dtype.value), json)
        console.print(f"written: {json}")


def table(found: Calibration) -> Table:
    result = Table("plan", title="agreement with the dense model", title_justify="left")
    for column in ("agreement", "95 %", "GMAC", "img/s", "× dense"):
        result.add_column(column, justify="right")
    dense = found.settings[0]
    for one in found.settings:
        result.add_row(
            one.label,
            f"{one.agreement:.2%}",
            f"{one.low:.2%} to {one.high:.2%}",
            f"{one.gmac:.4g}",
            f"{one.images_per_s:.1f}",
            f"{one.images_per_s / dense.images_per_s:.2f}",
            style="bold" if one is found.best else None,
        )
    return result


def verdict(found: Calibration, agreement: float) -> str:
    best, candidate = found.best, found.candidate
    words = f"fastest that agrees in at least {agreement:.2%}, shown by these images: {best.label}"
    if candidate is best:
        return words
    words += f"\nfastest that does so here: {candidate.label}, {candidate.low:.2%} to {candidate.high:.2%}"
    if found.images_needed is None:
        return words
    return words + f"; about {found.images_needed} images like these would show it"


def rows(found: Calibration) -> list[dict[str, Any]]:
    return [
        {
            "name": "agreement",
            "case": one.label,
            "images": found.images,
            "agreement": round(one.agreement, 5),
            "low": round(one.low, 5),
            "high": round(one.high, 5),
            "gmac": round(one.gmac, 4),
            "images_per_s": round(one.images_per_s, 1),
            "chosen": one is found.best,
        }
        for one in found.settings
    ]
