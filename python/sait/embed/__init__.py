"""Features, labels and scores of a million images: Parquet parts that are there whole or not at all.

>>> import timm, sait
>>> from sait.embed import Settings, embed
>>> model = sait.sparsify(timm.create_model("deit_small_patch16_224", pretrained=True), block=3, keep=0.45)
>>> # report of: embed(model, "photos", "features", Settings(batch=64, dtype=torch.bfloat16))  # doctest: +SKIP
>>> print(*report.lines(), sep="\\n")  # doctest: +SKIP
"""

from sait.embed.errors import BadInput
from sait.embed.parts import read
from sait.embed.report import Report
from sait.embed.run import Settings, embed, predict
from sait.embed.sources import open_source

__all__ = ["BadInput", "Report", "Settings", "embed", "open_source", "predict", "read"]
