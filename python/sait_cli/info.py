"""``sait info``: versions, what was built, which backend serves which op, and what of a model runs fused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = """\
Examples:

* sait info
* sait info vit_small_patch16_dinov3
* sait info runs/sait/model.safetensors
"""


def info(
    model: Annotated[
        str | None, typer.Argument(help="Also: what of this timm model or checkpoint sait.optimize runs fused.")
    ] = None,
) -> None:
    """Versions, what was built, and which backend serves which op on this machine."""
    if model is not None:
        return explain(model)
    from importlib import metadata

    import sait_kernels.info

    for name, version in (("sait", sait_kernels.__version__), ("timm", metadata.version("timm"))):
        print(f"{name:>14}  {version}")
    sait_kernels.info.main()
    return None


def explain(name: str) -> None:
    import sait
    import torch

    from sait_cli import options

    try:
        vit = sait.load(name) if Path(name).is_file() else sparse(name)
    except (TypeError, ValueError) as error:
        options.bad("MODEL", options.one_line(error))
    sait.optimize(vit)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            print(f"{str(dtype).removeprefix('torch.')}:")
            print(sait.explain(vit.to(dtype)))


def sparse(name: str) -> Any:
    """The model with random weights and a stage that it can run."""
    import sait
    from sait.families import family_of

    from sait_cli import options

    vit: Any = options.load_model(name, "random")[0]
    family = family_of(type(vit))
    score = "column" if family is not None and family.num_prefix(vit) == 0 else "cls"
    return sait.sparsify(vit, block=0, keep=1.0, score=score)
