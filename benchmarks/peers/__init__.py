"""What whole models are compared with: dense engines, and other ways to have fewer tokens, on the weights of one ViT.

Each file here has one or several peers in PEERS, by name. A method is written from the description in its paper, with
the setting whose arithmetic is closest to ours, so that speed is compared. Accuracy cannot be compared this way.
"""

from __future__ import annotations

import importlib
import pkgutil

from sait.bench import peers as of_sait
from sait.bench.peers import AUTOTUNED, BASELINE, Made, Peer, Setting

__all__ = ["AUTOTUNED", "BASELINE", "PEERS", "Made", "Peer", "Setting"]

GROUPS = ("dense", "pruned", "ours")  # their order in tables


def _found() -> dict[str, Peer]:
    files = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    every: dict[str, Peer] = {name: peer for module in (of_sait, *files) for name, peer in module.PEERS.items()}
    return dict(sorted(every.items(), key=lambda item: GROUPS.index(item[1].group)))


PEERS = _found()
