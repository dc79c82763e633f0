"""JPEG files -> pixels, by torchcodec or, where that does not load, by torchvision; on a GPU both use nvJPEG.

On a CPU both hand libjpeg-turbo's rows on: the same bits in the same time (0.21 and 0.20 ms for a photograph of
Caltech-101, one thread of an AMD EPYC). torchvision's decoders are deprecated since 0.29 and stay only for a torch
without CUDA, beside which PyPI's torchcodec does not find its libraries.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

Decoder = Callable[[Sequence[Tensor], str, torch.device], Sequence[Tensor]]


def decode_jpegs(files: Sequence[Tensor], channels: int, device: torch.device) -> Sequence[Tensor]:
    """uint8 [channels, H, W] on `device` of each file, which is uint8 [bytes] on the CPU; channels are 1 or 3.

    Raises RuntimeError where a file is refused, or the library was built without the decoder for `device`.
    """
    return decoder()(files, "RGB" if channels == 3 else "GRAY", device)


@functools.cache
def decoder() -> Decoder:
    """The function behind `decode_jpegs`. The first call imports its library, which takes a second."""
    try:
        from torchcodec.decoders import decode_jpeg as torchcodec_decode  # since 0.16
    except (ImportError, OSError, RuntimeError):  # OSError: a library that its own needs is not here
        return _torchvision()
    decode_jpeg = cast(Callable[..., Sequence[Tensor]], torchcodec_decode)  # of lists, which its types leave out

    def decode(files: Sequence[Tensor], mode: str, device: torch.device) -> Sequence[Tensor]:
        return decode_jpeg(list(files), mode=mode, device=device)

    return decode


def _torchvision() -> Decoder:
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as torchvision_decode

    decode_jpeg = cast(Callable[..., Sequence[Tensor]], torchvision_decode)

    # Once, and not around each call: filters are the process's, and threads decode.
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)

    def decode(files: Sequence[Tensor], mode: str, device: torch.device) -> Sequence[Tensor]:
        return decode_jpeg(list(files), ImageReadMode[mode], device=device)

    return decode
