"""Training of one model for every density (SaiT, arXiv 2210.05832), and its accuracy at each."""

from sait.train.config import Config, StoppedError, TrainingError
from sait.train.evaluate import evaluate
from sait.train.trainer import train

__all__ = ["Config", "StoppedError", "TrainingError", "evaluate", "train"]
