"""``sait show``: pictures of the patches that a model keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sait_cli import options, plans, published
from sait_cli.options import DType

if TYPE_CHECKING:
    from sait.state import Density

EXAMPLES = """\
Examples:

* sait show
* sait show --weights $(python -m sait.weights)
* sait show cat.jpg dog.png --keep 0.5 --keep 0.25 --out pictures
* sait show --model vit_base_patch16_224 --block 5 --mass 0.8 --score column
* sait show --method sait --method evit --method tome
* sait show --plan plan.json
* sait show --model runs/sait/model.safetensors --keep 0.3 --mass 0.9 --out pictures
"""


def show(
    context: typer.Context,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="By default the two photos that scikit-learn ships; for a checkpoint, test images of canvas."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Any timm Vision Transformer, by default {options.DEFAULT_MODEL}, or that of --weights; or a "
            "checkpoint of `sait train`, which has its own block."
        ),
    ] = None,
    block: options.Block = 3,
    keep: options.Keep = [0.7, 0.45, 0.3],  # noqa: B006  (the default that --help shows; nothing changes it)
    mass: options.Mass = [0.9],  # noqa: B006
    max_keep: options.MaxKeep = None,
    method: options.Method = None,
    pairs: options.Pairs = [13],  # noqa: B006
    threshold: options.Threshold = [0.006],  # noqa: B006
    plan: plans.PlanPath = None,
    score: options.ScoreKind = "cls",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    dtype: Annotated[DType, typer.Option(help="What the model computes in.")] = DType.fp32,
    backend: options.ForcedBackend = None,
    out: Annotated[Path, typer.Option(help="The folder for the pictures.")] = Path(),
) -> None:
    """Draws the kept patches over photos, several densities side by side: a PNG for each photo.

    Of a checkpoint without photos: one PNG, canvas.png, of easy and hard test images. Weights that have a saliency
    decoder draw the saliency map below each panel: of the dense model, and of the pruned ones with their dropped
    patches scattered back.
    """
    import sait
    import torch
    from sait.data.photos import canvas_examples, draw_kept, draw_map, fit_to_grid, sheet, to_tensor
    from sait.saliency import saliency
    from sait.sparsify import name_of, run_as

    place = options.check_device(device, backend)
    photos = options.open_photos(images or [])
    options.make_folder(out, "--out")
    ranks = score
    file = plans.read(context, plan)
    model = options.model_name(plans.model_of(file, model), weights)
    if model.endswith(".safetensors"):
        loaded, block, ranks = load_checkpoint(model)
        described = "trained weights"
    else:
        loaded, described = options.load_model(model, weights)
    expected = options.preprocessing(loaded)
    if model.endswith(".safetensors"):
        expected = expected._replace(size=loaded.patch_embed.img_size)
        photos = photos if images else canvas_examples(expected.size[0])
    batch = torch.stack([to_tensor(photo, expected) for photo in photos.values()]).to(place, dtype.as_torch())
    if file is not None:
        plans.check_name(file, plan, model)
        loaded = plans.applied(file, plan, loaded)
        of_methods, block, ranks = [loaded._sait.plan], 0, "column"
    else:
        of_methods = published.of_methods(context, method or [], keep, pairs, threshold)
        of_methods = published.of_trained(context, loaded, of_methods)
    for part in (part for one in of_methods for part in one.learned().values()):
        part.to(place, dtype.as_torch())
    densities = [] if of_methods else options.densities(context, keep, mass, max_keep)
    options.check_prunable(loaded, block, ranks, densities)
    published.check_plans(loaded, of_methods)
    decoder = options.load_decoder(weights)
    kept, maps = {}, []
    with options.progress() as bar, options.running_on(backend), torch.inference_mode():
        own = sait.Plan((sait.Stage(block, keep=1.0),), ranks)
        sait.sparsify(loaded.to(place, dtype.as_torch()), own)
        if decoder is not None:
            decoder.to(place, dtype.as_torch())
            maps.append(saliency(sait.set_density(loaded), decoder, batch).float())
        every: list[Density | sait.Plan] = [*densities, *of_methods]
        for density in bar.track(every, description="choosing patches"):
            run_as(loaded, density, own)
            if decoder is None:
                loaded(batch)
            else:
                maps.append(saliency(loaded, decoder, batch).float())
            mask, grid = sait.kept_mask(loaded)
            kept[name_of(density)] = mask.unflatten(1, grid)
    console = Console(highlight=False)
    console.print(f"{model}, {described}" + ("" if of_methods else f"; block {block}, score {ranks}"))
    if described.startswith("random"):
        console.print("With random weights the choice of patches carries no meaning.")
    title = f"{model}, {described.partition(' (')[0]}: patches kept"
    title += " behind the last block" if of_methods else f" at block {block} by {ranks} score"
    pictures: dict[str, list[list[tuple[str, Any]]]] = {}
    for i, (name, photo) in enumerate(photos.items()):
        of_canvas = model.endswith(".safetensors") and not images
        panels = [(name if of_canvas else "photo", fit_to_grid(photo, grid))]
        for label, masks in kept.items():
            count = int(masks[i].sum())
            panels.append((f"{label}: {count} of {masks[i].numel()} patches", draw_kept(photo, masks[i])))
        rows = pictures.setdefault("canvas" if of_canvas else name, [])
        rows.append(panels)
        if maps:
            of_photo = [of_density[i] for of_density in maps]
            labels = ["saliency, dense"]
            labels += [f"off by {(found - of_photo[0]).abs().mean():.3f} on average" for found in of_photo[1:]]
            drawn = [draw_map(found, grid) for found in of_photo]
            rows.append(list(zip(labels, drawn, strict=True)))
    for name, rows in pictures.items():
        path = out / f"{name}.png"
        sheet(rows, title).quantize(256).save(path, optimize=True)  # 256 colours: less than half the bytes
        console.print(f"written: {path}")


def load_checkpoint(path: str) -> tuple[Any, int, str]:
    """(the model, the first block where it drops tokens, its score)."""
    from sait import checkpoint
    from sait.state import state_of

    try:
        model = checkpoint.load(path)
    except OSError as error:
        options.bad("--model", f"cannot read {path}: {error.strerror}.")
    except ValueError as error:
        options.bad("--model", options.one_line(error))
    plan = state_of(model, "show").plan
    return model, plan.stages[0].block, str(plan.score)
