"""The projection head of DINO (arXiv:2104.14294, appendix C): an MLP, a unit vector, a weight-normed linear layer."""

from __future__ import annotations

import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.dtensor import to_local
from dino_fast.errors import UserError
from dino_fast.models.vit import Linear, init_linear


class DINOHead(nn.Module):
    """Features `[rows, in_dim]` -> prototype logits `[rows, out_dim]`.

    `head.last_layer(head.bottleneck(x))` is `head(x)`: losses that never write the logits take the two parts. With
    `norm_last_layer` the prototypes keep length 1 (`last_layer.weight_g` is frozen).

    With `predictor` two more layers, `bottleneck_dim -> hidden_dim -> bottleneck_dim`, follow the MLP while `predicts`
    is true. A teacher has them too, so that its parameters match the student's by name, and sets `predicts` to False.

    Raises UserError for `nlayers` or `out_dim` below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        predictor: bool = False,
    ) -> None:
        super().__init__()
        if nlayers < 1 or out_dim < 1:
            raise UserError(f"nlayers is {nlayers} and out_dim {out_dim}; both must be at least 1")
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers = _layers(widths, use_bn)
        # A single layer is named `mlp.weight`, as the original names it.
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        self.predictor: nn.Module | None = None
        self.predicts = predictor
        if predictor:
            self.predictor = nn.Sequential(*_layers([bottleneck_dim, hidden_dim, bottleneck_dim], use_bn))
        self.apply(init_linear)
        # Built after init_linear, so that it keeps that of torch's linear layer.
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.norm_last_layer = norm_last_layer
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Prototype logits `[rows, out_dim]` of features `[rows, in_dim]`."""
        return cast(Tensor, self.last_layer(self.bottleneck(x)))

    def bottleneck(self, x: Tensor) -> Tensor:
        """`[rows, in_dim]` -> unit vectors `[rows, bottleneck_dim]`."""
        x = self.mlp(x)
        if self.predictor is not None and self.predicts:
            x = self.predictor(x)
        return F.normalize(x, dim=-1)


def _layers(widths: list[int], use_bn: bool) -> list[nn.Module]:
    """Linear layers from width to width, with GELU between them and batch norm before it where asked for."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        if layers:
            layers += [nn.BatchNorm1d(before), nn.GELU()] if use_bn else [nn.GELU()]
        layers.append(Linear(before, after))
    return layers


class WeightNormLinear(nn.Module):
    """Weight-normalized linear layer without bias: `x W^T` with W = g v / |v| row by row.

    Parameters, float32: `weight_v` `[out, in]`, initialized as torch's linear layer; `weight_g` `[out, 1]`, ones.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=False)
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(linear.weight.detach())

    @property
    def weight(self) -> Tensor:
        """The weight matrix `[out, in]`; differentiable."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[rows, in]` -> `[rows, out]`."""
        return F.linear(x, self.weight)

    def mean_logits(self, mean: Tensor) -> Tensor:
        """Mean float32 logits `[out]` of inputs whose mean is `mean` `[in]`: the layer is linear.

        The weight matrix is not made. With sharded parameters the result is that of this process's rows.
        """
        v, g = to_local(self.weight_v).float(), to_local(self.weight_g).float()
        logits: Tensor = torch.mv(v, mean.float()) * (g[:, 0] / torch.linalg.vector_norm(v, dim=1))
        return logits

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.weight_v.shape[1]}, out_features={self.weight_v.shape[0]}"
