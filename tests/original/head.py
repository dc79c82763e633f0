"""The published projection head and the wrapper that runs crops of several sizes."""

from __future__ import annotations

import itertools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vit import init_linear


class DINOHead(nn.Module):
    """`[rows, in_dim]` -> prototype logits `[rows, out_dim]`: an MLP, a unit vector, a weight-normed linear layer."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(before, after))
            if i < nlayers - 1:
                layers += [nn.BatchNorm1d(after), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                init_linear(layer)
        last = nn.Linear(bottleneck_dim, out_dim, bias=False)  # keeps torch's default initialisation
        with warnings.catch_warnings():
            # Newer torch names the same thing otherwise; the names weight_g and weight_v are the published ones.
            warnings.simplefilter("ignore", FutureWarning)
            self.last_layer = nn.utils.weight_norm(last)
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class MultiCropWrapper(nn.Module):
    """Runs the backbone once per run of crops of one resolution, then the head once on all class tokens."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Tensor:
        sizes = torch.tensor([crop.shape[-1] for crop in crops])
        ends = torch.cumsum(torch.unique_consecutive(sizes, return_counts=True)[1], 0).tolist()
        start, output = 0, torch.empty(0, device=crops[0].device)
        for end in ends:
            output = torch.cat((output, self.backbone(torch.cat(crops[start:end]))))
            start = end
        return self.head(output)
