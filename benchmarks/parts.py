"""The named parts of `make end-to-end`: what each measures, and what the report names where that is missing."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("bf16", "fp32")
OPTIMIZED = ("ours-optimized-dense", "ours-optimized")


@dataclass(frozen=True)
class Part:
    """Every model at every batch, in each of DTYPES; ``quick`` takes fewer samples."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    peers: tuple[str, ...]
    quick: bool = False

    def settings(self) -> list[tuple[str, int, str]]:
        return [(model, batch, dtype) for model in self.models for dtype in DTYPES for batch in self.batches]


PARTS = {
    "models": Part(
        models=(
            "deit_tiny_patch16_224",
            "deit_base_patch16_224",
            "vit_small_patch14_dinov2@224",
            "vit_small_patch16_dinov3",
        ),
        batches=(16,),
        peers=("openvino", "openvino-pruned", *OPTIMIZED),
    ),
    "large": Part(
        models=("vit_large_patch16_224", "vit_small_patch16_384"),
        batches=(1, 4),
        peers=("openvino", "openvino-pruned", "ours-dense", "ours", *OPTIMIZED),
        quick=True,
    ),
}
