"""One picture of all crops of a few images, as training sees them."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dino_fast.augment import MultiCrop, pair
from dino_fast.data.decode import ImageError
from dino_fast.data.loader import mix
from dino_fast.data.sources import Source
from dino_fast.errors import UserError
from dino_fast.ops.multi_crop import to_pillow

_GAP = 4
_MARKS = ("#e4572e", "#2e86e4")  # global boxes, local boxes


def draw(images: list[Tensor], crops: MultiCrop, seed: int) -> Image.Image:
    """One row an image (uint8 [C, H, W]): itself with the boxes of its crops, then the crops before normalisation."""
    params = crops.sample_each([mix(seed, i) for i in range(len(images))])
    global_crops, local_crops = crops.apply(images, params)
    boxes = crops.boxes(params, [(image.shape[1], image.shape[2]) for image in images]).tolist()
    mean, std = crops.statistics(images[0].shape[0])
    scale = max(1, round(160 / pair(crops.global_size)[0]))  # small images are enlarged, or nothing is to be seen
    rows = []
    for i, image in enumerate(images):
        views = [*global_crops[:, i], *local_crops[:, i]]
        tiles = [
            _enlarged(_picture(view.mul(std).add(mean).mul(255).round().clamp(0, 255).byte()), scale) for view in views
        ]
        rows.append([_boxed(image, boxes[i], tiles[0].height), *tiles])
    return _grid(rows)


def readable(source: Source, count: int) -> list[Tensor]:
    """`count` images spread over the source; those that cannot be read are left out and named."""
    if count < 1:
        raise UserError(f"--images is {count}; give 1 or more")
    images: list[Tensor] = []
    reason = ""
    for step in (
        torch.linspace(0, len(source) - 1, min(count, len(source)), dtype=torch.float32, device="cpu")
        .round()
        .long()
        .tolist()
    ):
        try:
            images.append(source.read(step))
        except ImageError as error:
            reason = str(error)
            print(f"left out: {reason}")
    if not images:
        raise UserError(f"none of the images chosen can be read; the last: {reason}")
    return images


def _picture(pixels: Tensor) -> Image.Image:
    return to_pillow(pixels)[0].convert("RGB")


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _boxed(image: Tensor, boxes: list[list[int]], height: int) -> Image.Image:
    """The image at the height of its row, with the boxes of its crops."""
    factor = height / image.shape[1]
    width = min(max(1, round(image.shape[2] * factor)), 4 * height)  # very long images are squeezed
    picture = _picture(image).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    across = width / image.shape[2]
    for v, (top, left, h, w) in reversed(list(enumerate(boxes))):
        x, y = left * across, top * factor
        box = (x, y, max(x, x + w * across - 1), max(y, y + h * factor - 1))  # a squeezed one may be under a pixel
        pen.rectangle(box, outline=_MARKS[v >= 2], width=2)
    return picture


def _grid(rows: list[list[Image.Image]]) -> Image.Image:
    first = max(row[0].width for row in rows)
    widths = [first + _GAP + sum(tile.width + _GAP for tile in row[1:]) for row in rows]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (max(widths) + _GAP, sum(heights) + _GAP), "#b0b0b0")  # neither black nor white
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        sheet.paste(row[0], (_GAP, y))
        x = 2 * _GAP + first
        for tile in row[1:]:
            sheet.paste(tile, (x, y))
            x += tile.width + _GAP
        y += height
    return sheet
