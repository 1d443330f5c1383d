"""The evidence for the method on canvas: trains every variant with several seeds, measures, writes docs/accuracy.md.

``python experiments/paper.py`` or ``make paper``. Finished trainings are not repeated, and an interrupted one
continues, so the work can be split over several sittings. Each training is a ``sait train`` on one thread, one for each
core at the same time: this trains more images a second than one after the other on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paper_report
import sait
import torch
from rich.console import Console
from sait import checkpoint
from sait.bench import measure
from sait.state import Density
from sait.train import evaluate
from sait.train.config import read_config
from sait.train.data import expected_by, open_data
from sait.train.processes import Processes
from sait.train.trainer import MODEL, STATE

ROOT = Path(__file__).resolve().parents[1]
ALONE = Processes(0, 1, torch.device("cpu"))

# name -> differences from the config file. All but plain learn from the plain model of their seed.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "dense"},
    "SaiT": {},
    "SaiT, no distillation": {"alpha": 0.0},
    "SaiT, column": {"score": "column"},
    "sparse only": {"mode": "sparse", "keep": 0.45},
}
KEEPS = (0.85, 0.7, 0.6, 0.45, 0.3, 0.2, 0.15)
MASSES = (0.95, 0.9, 0.8, 0.7, 0.5)
SPEED_BATCH = 64
PUBLISHED = ("SaiT", "plain")
PICTURED = ("--keep", "0.45", "--keep", "0.15", "--mass", "0.9", "--mass", "0.7")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="canvas", help="a YAML file, or one of the package by its name")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paper", help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of tables, plots and figures")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints", help="folder for those of seed 0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at once")
    parser.add_argument("--train-only", action="store_true", help="measure nothing yet")
    parser.add_argument("--measure-only", action="store_true", help="train nothing more")
    options = parser.parse_args(arguments)
    if not options.measure_only:
        train_all(options.config, options.runs, range(options.seeds), options.jobs)
    if options.train_only:
        return
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name in VARIANTS:
            if is_trained(name, seed, options.config, options.runs):
                rows += model_rows(name, seed, options.config, options.runs, options.images)
    published = folder("SaiT", 0, options.runs) / MODEL
    rows += speed_rows(published)
    config = read_config(options.config, {})
    document = measure.results(rows, config=config.to_dict(), parameters=parameters(published))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    paper_report.write(document, options.out)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        shutil.copyfile(
            folder(name, 0, options.runs) / MODEL, options.checkpoints / f"{name.lower()}-canvas.safetensors"
        )
    pictured = relative(options.checkpoints / "sait-canvas.safetensors")
    words = ["--model", pictured, *PICTURED, "--out", str(options.out)]
    subprocess.run([sys.executable, "-m", "sait_cli", "show", *words], check=True, cwd=ROOT)


def train_all(config: Path, runs: Path, seeds: Sequence[int], jobs: int) -> None:
    """Every variant with every seed; plain models first, since the others of the same seed learn from them."""
    with ThreadPoolExecutor(jobs) as pool:
        plain = {seed: pool.submit(train, "plain", seed, config, runs) for seed in seeds}

        def after_plain(name: str, seed: int) -> None:
            plain[seed].result()
            train(name, seed, config, runs)

        others = [pool.submit(after_plain, name, seed) for seed in seeds for name in VARIANTS if name != "plain"]
        for job in others:
            job.result()


def train(name: str, seed: int, config_file: str, runs: Path) -> None:
    """Runs ``sait train`` until the variant's checkpoint is complete; its output goes to log.txt beside it."""
    out = folder(name, seed, runs)
    changes = dict(VARIANTS[name])
    if name != "plain":
        changes["teacher"] = relative(folder("plain", seed, runs) / MODEL)
    if is_trained(name, seed, config_file, runs):
        return
    words = ["--config", config_file, "--out", relative(out), "--seed", str(seed)]
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    words += ["--resume"] if (out / STATE).exists() else []
    Console(stderr=True, highlight=False).print(shlex.join(["sait", "train", *words]), soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("a") as log:
        subprocess.run(
            [sys.executable, "-m", "sait_cli", "train", *words],
            check=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def is_trained(name: str, seed: int, config_file: str, runs: Path) -> bool:
    """Whether the variant's checkpoint is that of the last epoch."""
    path, config = folder(name, seed, runs) / MODEL, read_config(config_file, {})
    return path.exists() and checkpoint.read(path).metadata["metrics"][-1]["epoch"] == config.epochs


def model_rows(name: str, seed: int, config_file: str, runs: Path, images: int) -> list[dict[str, Any]]:
    """The measurements of one model, from rows.json beside its checkpoint if that has as many images."""
    path = folder(name, seed, runs) / MODEL
    cache = path.with_name("rows.json")
    if cache.exists() and cache.stat().st_mtime > path.stat().st_mtime:
        found: list[dict[str, Any]] = json.loads(cache.read_text())
        if found[0]["images"] == images:
            return found
    rows = list(accuracy_rows(name, seed, path, config_file, images))
    if name == "SaiT":
        rows += difficulty_rows(seed, path, images)
    cache.write_text(json.dumps(rows))
    return rows


def relative(path: Path) -> str:
    """The path relative to the repository's root, if it is inside."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def folder(name: str, seed: int, runs: Path) -> Path:
    return runs / f"{name.replace(', ', '-').replace(' ', '-').lower()}-{seed}"


def accuracy_rows(name: str, seed: int, path: Path, config_file: str, images: int) -> Iterator[dict[str, Any]]:
    """Every density; for SaiT also, for each mass, the fixed number of patches that is its mean."""
    model = sait.load(path)
    config = read_config(config_file, {"canvas_eval_images": images})
    data = open_data(config, expected_by(model), ALONE, for_training=False, held_out="test")
    densities = [Density(), *map(Density, KEEPS), *(Density(mass=mass) for mass in MASSES)]
    dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32  # as it was trained
    results = evaluate(model, data, densities, ALONE, dtype=dtype)
    for result in results:
        yield row(name, seed, result)
    if name == "SaiT":
        adaptive = [result for result in results if result.density.mass is not None]
        counts = [Density(keep=round(result.tokens) - 1) for result in adaptive]
        for twin, result in zip(adaptive, evaluate(model, data, counts, ALONE, dtype=dtype), strict=True):
            yield {**row(name, seed, result), "twin": twin.label}


def row(name: str, seed: int, result: Any) -> dict[str, Any]:
    return {
        "name": "accuracy",
        "model": name,
        "seed": seed,
        "case": result.label,
        "images": result.images,
        "accuracy": result.accuracy,
        "tokens": round(result.tokens, 2),
        "gmac": result.gmac,
    }


@torch.no_grad()
def difficulty_rows(seed: int, path: Path, images: int) -> Iterator[dict[str, Any]]:
    """Patches that adaptive density keeps in the quarters with the largest and smallest digits and contrasts."""
    model = sait.set_density(sait.load(path), mass=0.9)
    expected = expected_by(model)
    canvas = sait.data.Canvas("test", images, img_size=expected.size[1], mean=expected.mean, std=expected.std)
    kept = []
    for batch, _ in canvas.batches(128):
        model(batch)
        kept.append(sait.selections(model)[-1].cu_seqlens.diff() - model.num_prefix_tokens)
    patches = torch.cat(kept).float()
    for what, values in (("size", canvas.placements.side), ("contrast", canvas.placements.contrast)):
        order, quarter = values.argsort(), len(values) // 4
        for quartile, chosen in (("greatest", order[-quarter:]), ("least", order[:quarter])):
            yield {
                "name": "difficulty",
                "case": f"{quartile} {what}",
                "seed": seed,
                "patches": round(patches[chosen].mean().item(), 2),
            }


def speed_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Forwards of one batch at every density, interleaved; speed does not depend on the seed.

    "dense" is timm's own forward, "keep 1.0" all patches through the kernels.
    """
    model = sait.load(path)
    expected = expected_by(model)
    canvas = sait.data.Canvas("test", SPEED_BATCH, img_size=expected.size[1], mean=expected.mean, std=expected.std)
    images, _ = canvas.batch(range(SPEED_BATCH))
    densities = [Density(), *map(Density, (1.0, *KEEPS)), *(Density(mass=mass) for mass in MASSES)]

    def forward(density: Density) -> Any:
        return lambda: sait.set_density(model, keep=density.keep, mass=density.mass)(images)

    with torch.inference_mode():
        seconds = measure.interleave([forward(density) for density in densities], 20)
    for density, taken in zip(densities, seconds, strict=True):
        case = "dense" if density == Density() else density.label
        yield {"name": "speed", "case": case, "batch": SPEED_BATCH, "images_per_s": round(SPEED_BATCH / taken, 1)}


def parameters(path: Path) -> int:
    return sum(parameter.numel() for parameter in sait.load(path).parameters())


if __name__ == "__main__":
    main()
