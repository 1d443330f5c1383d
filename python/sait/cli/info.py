"""``sait info``: versions, what was built, and which backend serves which op."""

from __future__ import annotations


def info() -> None:
    """Versions, what was built, and which backend serves which op on this machine."""
    import timm

    import sait_kernels.info

    for name, version in (("sait", sait_kernels.__version__), ("timm", timm.__version__)):
        print(f"{name:>14}  {version}")
    sait_kernels.info.main()
