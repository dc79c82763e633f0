"""A plain transcription of the published DINO algorithm (arXiv:2104.14294): the yardstick of tests and benchmarks.

Everything here is eager PyTorch in the shape in which the original wrote it, pair loop and all, and is kept slow on
purpose. It is written from the published algorithm, not copied, and is installed as `dino_fast.benchmarks.original`.
"""

from .head import DINOHead, MultiCropWrapper
from .loss import DINOLoss, einsum_dino_loss
from .optim import LARS, cancel_gradients_last_layer, clip_gradients, cosine_scheduler, ema, get_params_groups
from .train import Trainer, train_step
from .vit import ViT

__all__ = [
    "LARS",
    "DINOHead",
    "DINOLoss",
    "MultiCropWrapper",
    "Trainer",
    "ViT",
    "cancel_gradients_last_layer",
    "clip_gradients",
    "cosine_scheduler",
    "einsum_dino_loss",
    "ema",
    "get_params_groups",
    "train_step",
]
