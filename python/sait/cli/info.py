"""``sait info``: versions, what was built, and which backend serves which op."""

from __future__ import annotations


def info() -> None:
    """Versions, what was built, and which backend serves which op on this machine."""
    import sait_kernels.info
    import timm

    print(f"{'timm':>14}  {timm.__version__}")
    print(f"{'sait':>14}  {sait_kernels.__version__}, {len(timm.list_models('vit_*'))} vit_* models in timm")
    sait_kernels.info.main()
