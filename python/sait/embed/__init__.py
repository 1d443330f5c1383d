"""Features, labels and scores of a million images: Parquet parts that are there whole or not at all.

``embed(model, "photos", "features", Settings(batch=64))`` writes them, and goes on where it ended; ``read("features")``
gives a table. docs/scale.md has the rest.
"""

from sait.embed.errors import BadInput
from sait.embed.parts import read
from sait.embed.report import Report
from sait.embed.run import Settings, embed, predict
from sait.embed.sources import open_source

__all__ = ["BadInput", "Report", "Settings", "embed", "open_source", "predict", "read"]
