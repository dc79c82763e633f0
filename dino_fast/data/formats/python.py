"""Images that a program has: arrays, tensors, lists, and data sets of PyTorch.

Pixels are 8 bits: uint8 as they are, other numbers scaled from a range of values to 0..255. The range is the one that
is stated; else 0 to 1 for floats, 0 to 255 for integers that stay within it, and 0 to 65535 for uint16 that uses the
upper half. Anything else is refused with the values that were found, because a guess could make black images.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from typing_extensions import override

from dino_fast.data.decode import ImageError, Jpeg, decode
from dino_fast.data.formats import folder
from dino_fast.data.labels import class_numbers
from dino_fast.data.source import ArraySource, Source
from dino_fast.errors import UserError
from dino_fast.progress import watched

Range = tuple[float, float]  # the values that become black and white
ACCEPTED = (
    "a path; images as an array or tensor [N, H, W], [N, H, W, C] or [N, C, H, W]; a list of images or paths; a pair "
    "of images and their labels; a torch.utils.data.Dataset of images or (image, label); or a datasets.Dataset"
)
_SAMPLED = 64  # images that are looked at for the range and the channels
_TRIED = 8  # items of a data set that are tried before it is refused
_CHECKED = 1000  # paths of a list that are looked for when it is opened
_LABELS_READ = 10_000  # items of a data set, at most, that are read for their labels where it has no `targets`
_IMAGES, _LABELS = ("image", "images", "img", "pixel_values"), ("label", "labels", "target", "targets")
_TURNED = 0x0112  # EXIF's orientation


class Scale(NamedTuple):
    """From values to 0..255. `stated`: the user's range, beyond which values are clipped and NaN is black."""

    low: float
    high: float
    stated: bool = False


class DecodedSource(Source):
    """Images without a file: `read` makes each from what `item` gives, which is asked by one thread at a time."""

    def __init__(self, name: str, count: int, scale: Scale | None) -> None:
        self._name, self._count, self._scale = name, count, scale
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @override
    def name(self, index: int) -> str:
        return f"{self._name}, image {index}"

    def item(self, index: int) -> Any:
        """One image: an array or tensor [H, W], [H, W, C] or [C, H, W], of PIL, a path, or an encoded file."""
        raise TypeError(f"{type(self).__name__} has no items")

    @override
    def read(self, index: int) -> Tensor:
        try:
            with self._lock:
                item = self.item(index)
                if isinstance(item, Image.Image):  # whose file is read only now, perhaps
                    item = _of_pillow(item)
            return _with_channels(to_pixels(item, self._scale), self.channels)
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from error

    @override
    def jpeg_or_pixels(self, index: int) -> Jpeg | Tensor:
        return self.read(index)


class ArrayItems(DecodedSource):
    """An array [N, C, H, W] of any number format, byte order and strides, converted image by image."""

    def __init__(self, images: np.ndarray | Tensor, name: str, scale: Scale | None) -> None:
        super().__init__(name, len(images), scale)
        self.images = images
        self.channels = images.shape[1]

    @override
    def read(self, index: int) -> Tensor:
        try:
            pixels = _eight_bits(_array(self.images[index]), self._scale)
            return _with_channels(torch.from_numpy(np.ascontiguousarray(pixels)), self.channels)
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from error


class ListSource(DecodedSource):
    """A list of images of any kinds and sizes."""

    def __init__(self, items: Sequence[Any], name: str, scale: Scale | None) -> None:
        super().__init__(name, len(items), scale)
        self.items = items

    @override
    def item(self, index: int) -> Any:
        return self.items[index]


class TorchSource(DecodedSource):
    """A data set of PyTorch with a length, of images or (image, label)."""

    def __init__(self, dataset: Any, name: str, count: int, scale: Scale | None) -> None:
        super().__init__(name, count, scale)
        self.dataset = dataset

    @override
    def name(self, index: int) -> str:
        return f"{self._name}, item {index}"

    @override
    def item(self, index: int) -> Any:
        return image_and_label(_get(self.dataset, index))[0]


def open_images(images: Any, labels: Any = None, name: str = "", value_range: Range | None = None) -> Source:
    """Opens an array, tensor, list or data set of PyTorch; `labels`, one an image, are its labels.

    `value_range` (low, high): the values that become black and white. `name` is what to call them in messages. Raises
    UserError for what holds no images, or images of another kind, and for labels that are no classes.
    """
    if value_range is not None:
        low, high = _checked_range(value_range)
        stated: Scale | None = Scale(low, high, True)
    else:
        stated = None
    source = _open(images, name, stated)
    if labels is not None:
        source.labels, source.classes = class_labels(labels, len(source))
    return source


def _open(images: Any, name: str, stated: Scale | None) -> Source:
    if isinstance(images, np.ndarray) and images.dtype.kind in "UO" and images.ndim == 1:
        images = images.tolist()
    if isinstance(images, np.ndarray | Tensor):
        return _open_array(images, name or "array", stated)
    if isinstance(images, list | tuple):
        return _open_list(images, name or "list", stated)
    if isinstance(images, torch.utils.data.DataLoader):
        raise UserError("a DataLoader gives batches; give its data set (loader.dataset) instead")
    if isinstance(images, Mapping | bytes) or not (hasattr(images, "__getitem__") or hasattr(images, "__iter__")):
        raise UserError(f"cannot open a {type(images).__name__}; give {ACCEPTED}")
    return _open_dataset(images, name or type(images).__name__, stated)


# ---- arrays ----


def _open_array(images: np.ndarray | Tensor, name: str, stated: Scale | None) -> Source:
    kind = "b" if images.dtype == torch.bool else getattr(images.dtype, "kind", None)
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        if images.dtype == torch.bfloat16:  # which numpy has not
            images = images.float()
        kind = "c" if images.is_complex() else "f" if images.is_floating_point() else "u"
    if kind not in ("b", "u", "i", "f"):
        raise UserError(f"{name} holds {images.dtype}; images are numbers: uint8, or floats from 0 to 1")
    shape = list(images.shape)
    if images.ndim not in (3, 4):
        raise UserError(f"{name} has the shape {shape}; give images [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if 0 in shape:
        what = "images" if not shape[0] else "pixels in its images"
        raise UserError(f"{name} has the shape {shape}: there are no {what}")
    images = _channels_first(images, name)
    if images.dtype in (torch.uint8, np.uint8) and stated is None:
        plain = isinstance(images, Tensor) or (images.flags.writeable and min(images.strides) >= 0)
        if plain:
            tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
            return ArraySource(tensor, name=name)
    return ArrayItems(images, name, _scale_of([images[i] for i in _sampled(len(images))], stated, name))


def _channels_first(images: Any, name: str) -> Any:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, C, H, W], without a copy."""
    if images.ndim == 3:
        return images[:, None]
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first and last and isinstance(images, np.ndarray):
        raise UserError(
            f"{name} has the shape {list(images.shape)}: which is the channel? Give a torch tensor [N, C, H, W]"
        )
    if not first and not last:
        raise UserError(
            f"{name} has the shape {list(images.shape)}, in which neither the second nor the last size is 1 or 3 "
            "channels. Give the channels to use (images[..., :3] drops an opacity)"
        )
    if first:
        return images
    return images.permute(0, 3, 1, 2) if isinstance(images, Tensor) else images.transpose(0, 3, 1, 2)


# ---- lists ----


def _open_list(items: Sequence[Any], name: str, stated: Scale | None) -> Source:
    if not len(items):
        raise UserError(f"the {name} is empty; give at least one image")
    if all(isinstance(item, str | os.PathLike) for item in items):
        for place, path in enumerate(items[:_CHECKED]):
            if not os.path.isfile(os.path.expanduser(path)):
                raise UserError(
                    f"entry {place} of the {name}, {os.fspath(path)!r}, is no file (paths are relative to the working "
                    "directory)"
                )
        return folder.open_paths([os.path.expanduser(path) for path in items])
    sampled = [(i, items[i]) for i in _sampled(len(items))]
    for place, item in sampled:
        if not is_image(item):
            raise UserError(f"entry {place} of the {name} is {_kind(item)}, not an image. Give {ACCEPTED}")
    arrays = [_array(item) for _, item in sampled if isinstance(item, np.ndarray | Tensor)]
    source = ListSource(items, name, _scale_of(arrays, stated, name))
    _choose_channels(source, [item for _, item in sampled])
    return source


def _choose_channels(source: DecodedSource, items: Iterable[Any]) -> None:
    """Gray if every one of the items is. Raises UserError where none of them is an image."""
    found, reason = [], ""
    for item in items:
        try:
            found.append(len(to_pixels(item, source._scale)))
        except ImageError as error:
            reason = reason or str(error)
    if not found:
        raise UserError(f"{source._name}: {reason}")
    source.channels = max(found)


# ---- data sets ----


def _open_dataset(dataset: Any, name: str, stated: Scale | None) -> Source:
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError):
        raise UserError(
            f"{name} does not say how many images it has, and training needs their number: give it a __len__, or a "
            "list of its items"
        ) from None
    if count < 1:
        raise UserError(f"{name} is empty; give at least one image")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__"):
        return _open_iterable(dataset, name, count, stated)
    image, label = _first_item(dataset, name, count)
    arrays = [_array(image)] if isinstance(image, np.ndarray | Tensor) else []
    source = TorchSource(dataset, name, count, _scale_of(arrays, stated, name))
    _choose_channels(source, [image])
    labels = _targets(dataset, count)
    if labels is None and label is not None and count > _LABELS_READ:
        source.unused_labels = (
            f"the labels of {name} are not used: finding them means reading all of its {count} items. Give it an "
            "attribute `targets`, a list of its labels"
        )
    elif labels is None and label is not None:
        labels = _read_labels(dataset, name, count)
    if labels is not None:
        names = getattr(dataset, "classes", None)
        _use_labels(source, labels, names, name)
    return source


def _first_item(dataset: Any, name: str, count: int) -> tuple[Any, Any]:
    """The first item that can be read, of a few. Raises UserError with what is wrong with item 0."""
    problem: ImageError | None = None
    for index in range(min(count, _TRIED)):
        try:
            return image_and_label(_get(dataset, index))
        except ImageError as error:
            problem = problem or error
    raise UserError(f"{name}, item 0: {problem}") from problem


def _open_iterable(dataset: Iterable[Any], name: str, count: int, stated: Scale | None) -> Source:
    """Reads the items into memory: images are read in another order in every epoch."""
    pixels: list[Any] = []
    labels: list[Any] = []
    for item in watched(_items(dataset, name), count, f"items of {name} read"):
        image, label = image_and_label(item)
        if not is_image(image):
            raise UserError(f"{name}, item {len(pixels)} is {_kind(image)}, not an image. Give {ACCEPTED}")
        pixels.append(image)
        labels.append(label)
        if len(pixels) > count:
            break
    if len(pixels) != count:
        more = "more" if len(pixels) > count else f"only {len(pixels)}"
        raise UserError(f"{name} says that it has {count} items and gives {more}; correct its __len__")
    source = _open_list(pixels, name, stated)
    if any(label is not None for label in labels):
        _use_labels(source, labels, getattr(dataset, "classes", None), name)
    return source


def _items(dataset: Iterable[Any], name: str) -> Iterator[Any]:
    try:
        yield from dataset
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def _get(dataset: Any, index: int) -> Any:
    """An item. Raises ImageError for whatever the data set raises."""
    try:
        return dataset[index]
    except Exception as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error


def image_and_label(item: Any) -> tuple[Any, Any]:
    """An item of a data set: an image, (image, label), or a mapping with both. Raises ImageError for another."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in _IMAGES if key in item), None)
        if image is None:
            raise ImageError(
                f"it has the keys {', '.join(map(str, item))}; expected 'image', and 'label' if there is one"
            )
        return image, next((item[key] for key in _LABELS if key in item), None)
    if isinstance(item, tuple | list):
        if not 1 <= len(item) <= 2 or not is_image(item[0]):
            inside = ", ".join(_kind(part) for part in item[:4])
            raise ImageError(
                f"it is a {type(item).__name__} of {len(item)} ({inside}); expected an image or (image, label)"
            )
        return item[0], item[1] if len(item) == 2 else None
    if not is_image(item):
        raise ImageError(f"it is {_kind(item)}; expected an image or (image, label)")
    return item, None


def _targets(dataset: Any, count: int) -> Any:
    """Labels that a data set of torchvision's kind keeps beside its images, or those of a part of one; else None."""
    if isinstance(dataset, torch.utils.data.Subset):
        whole = _targets(dataset.dataset, len(cast(Any, dataset.dataset)))
        return None if whole is None else [whole[i] for i in dataset.indices]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [_targets(part, len(cast(Any, part))) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if isinstance(found, list | tuple | np.ndarray | Tensor) and len(found) == count:
            change = getattr(dataset, "target_transform", None)
            return found if change is None else [change(label) for label in found]
    return None


def _read_labels(dataset: Any, name: str, count: int) -> list[Any]:
    labels = []
    for index in watched(range(count), count, f"labels of {name} read"):
        try:
            labels.append(image_and_label(_get(dataset, index))[1])
        except ImageError:
            labels.append(None)
    return labels


def _use_labels(source: Source, labels: Any, names: Any, name: str) -> None:
    """Sets the labels of a data set; those that are no classes are not used, as training needs none."""
    named = isinstance(names, list | tuple) and all(isinstance(text, str) for text in names)
    try:
        source.labels, source.classes = class_labels(labels, len(source), names if named else None)
    except UserError as error:
        source.unused_labels = f"the labels of {name} are not used: {error}"


# ---- one image ----


def to_pixels(item: Any, scale: Scale | None) -> Tensor:
    """One image of any kind -> uint8 [1 or 3, H, W]. Raises ImageError with the reason."""
    if isinstance(item, str | os.PathLike):
        try:
            with open(item, "rb") as file:
                item = file.read()
        except OSError as error:
            raise ImageError(f"{os.fspath(item)}: {error.strerror or error}") from error
    if isinstance(item, bytes | bytearray):
        return decode(bytes(item), 3)
    if isinstance(item, Image.Image):
        item = _of_pillow(item)
    if not isinstance(item, np.ndarray | Tensor):
        raise ImageError(f"{_kind(item)} is no image")
    first = isinstance(item, Tensor)
    array = _array(item)
    if array.dtype.kind not in "buif":
        raise ImageError(f"an array of {array.dtype}; images are numbers: uint8, or floats from 0 to 1")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise ImageError(f"an image of shape {list(array.shape)}; expected [H, W], [H, W, C] or [C, H, W]")
    if not (array.shape[0] in (1, 3) and (first or array.shape[2] not in (1, 3))):
        if array.shape[2] not in (1, 3):
            raise ImageError(f"an image of shape {list(array.shape)}, which has neither 1 nor 3 channels")
        array = array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(_eight_bits(array, scale)))


def image_pixels(item: Any, channels: int) -> Tensor:
    """One image of any kind -> uint8 [channels, H, W]; floats are pixels from 0 to 1. Raises ImageError."""
    return _with_channels(to_pixels(item, None), channels)


def _of_pillow(image: Image.Image) -> np.ndarray:
    """[H, W] or [H, W, 3], upright; opacity is dropped."""
    try:
        image.load()
        if image.getexif().get(_TURNED, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "L", "LA", "La"):
            return np.array(image.convert("L"))
        if image.mode.startswith("I") or image.mode == "F":
            return np.array(image)
        return np.array((image.convert("RGBA") if "transparency" in image.info else image).convert("RGB"))
    except Exception as error:  # Pillow's plugins raise anything at all on broken files
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def _eight_bits(array: np.ndarray, scale: Scale | None) -> np.ndarray:
    """uint8 of the same shape."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8 and not (scale and scale.stated):
        return array
    if scale is None or not scale.stated:
        low, high = float(array.min()), float(array.max())
        scale = scale or _guess(low, high, array.dtype)
        if scale is None or not (low >= scale.low and high <= scale.high):  # NaN is neither
            raise ImageError(f"{array.dtype} from {low:g} to {high:g}{_beyond(scale)}. {_STATE}")
    if array.dtype.kind in "ui" and (scale.low, scale.high) == (0, 255):
        return array.clip(0, 255).astype(np.uint8)
    values = (array.astype(np.float64) - scale.low) * (255 / (scale.high - scale.low))
    levels: np.ndarray = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0).round().clip(0, 255).astype(np.uint8)
    return levels


_STATE = (
    "Give floats from 0 to 1 (before any normalization: dino-fast normalizes them itself), or state the range: "
    "{'images': images, 'range': (low, high)}"
)


def _beyond(scale: Scale | None) -> str:
    return "" if scale is None else f", where the others are from {scale.low:g} to {scale.high:g}"


def _guess(low: float, high: float, dtype: np.dtype[Any]) -> Scale | None:
    """The range of values from `low` to `high`, where it is clear."""
    if dtype.kind == "f":
        return Scale(0, 1) if low >= 0 and high <= 1 else None
    if low >= 0 and high <= 255:
        return Scale(0, 255)
    return Scale(0, 65535) if dtype.kind == "u" and dtype.itemsize == 2 and high > 32767 else None


def _scale_of(samples: Sequence[Any], stated: Scale | None, name: str) -> Scale | None:
    """The scale of images other than uint8, from some of them. Raises UserError where it is not clear."""
    arrays = [array for array in map(_array, samples) if array.dtype.kind in "uif" and array.dtype != np.uint8]
    if stated is not None or not arrays:
        return stated
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    scale = _guess(low, high, arrays[0].dtype)
    if scale is None:
        raise UserError(f"{name} holds {arrays[0].dtype} from {low:g} to {high:g}, whose range is not known. {_STATE}")
    return scale


def _array(item: Any) -> np.ndarray:
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        return cast(np.ndarray, (item.float() if item.dtype == torch.bfloat16 else item).numpy())
    return cast(np.ndarray, item)


def _with_channels(image: Tensor, channels: int) -> Tensor:
    """uint8 [1 or 3, H, W] -> [channels, H, W]."""
    if len(image) == channels:
        return image
    if image.is_floating_point() and channels in (1, 3):  # of a file of more than 8 bits
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device="cpu").view(3, 1, 1)
        return image.expand(3, -1, -1) if channels == 3 else (image * weights).sum(0, keepdim=True)
    source = ArraySource(image[None])
    source.channels = channels
    return source.read(0)


def is_image(item: Any) -> bool:
    """Whether it looks like one image: PIL's, an array of 2 or 3 dimensions, a path, an encoded file."""
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim in (2, 3)
    return isinstance(item, Image.Image | str | os.PathLike | bytes | bytearray)


def are_images(first: Any, second: Any) -> bool:
    """Whether the two are images, not many images and their labels."""
    return is_image(first) and is_image(second) and getattr(first, "ndim", 0) == getattr(second, "ndim", 0)


def _kind(item: Any) -> str:
    """What to call it in a message: `an array [3, 4] of float32`, `a dict`."""
    if isinstance(item, np.ndarray | Tensor):
        return f"an array {list(item.shape)} of {item.dtype}"
    return "None" if item is None else f"a {type(item).__name__}"


def _sampled(count: int) -> list[int]:
    return cast("list[int]", np.unique(np.linspace(0, count - 1, min(count, _SAMPLED), dtype=np.int64)).tolist())


def _checked_range(given: Any) -> Range:
    try:
        low, high = (float(x) for x in given)
    except (TypeError, ValueError):
        raise UserError(f"the range is {given!r}; give two numbers, (black, white)") from None
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise UserError(f"the range is ({low:g}, {high:g}); give the smaller number first")
    return low, high


# ---- labels ----


def class_labels(
    given: Any, count: int, names: Sequence[str] | None = None
) -> tuple[np.ndarray | None, list[str] | None]:
    """(int64 [count] with -1 for none, the classes' names or None) of one label an image, by `class_numbers`.

    None and -1 are no label. Raises UserError for labels that are no classes, NaN among them.
    """
    values = [_number(label) for label in given] if isinstance(given, list | tuple) else _array(given)
    try:
        array = np.asarray(values, dtype=object)
    except (ValueError, TypeError):
        raise UserError(f"labels are {_kind(given)} of values of several sizes; give one for each image") from None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if len(array.shape) != 1:
        raise UserError(
            f"labels have the shape {list(array.shape)}; one for each image is expected. Of one-hot rows give "
            "labels.argmax(1); several classes an image are not used"
        )
    if len(array) != count:
        raise UserError(f"{count} images with {len(array)} labels; give one for each")
    labels = array.tolist()
    for place, label in enumerate(labels):
        if isinstance(label, float) and label != label:
            raise UserError(f"label {place} is NaN; give -1 or None where an image has no label")
        if isinstance(label, float) and not label.is_integer():
            raise UserError(f"label {place} is {label}; a class is a whole number or text")
        if label is not None and not isinstance(label, int | float | str):
            raise UserError(f"label {place} is {_kind(label)}; a class is a whole number or text (not one-hot)")
        if isinstance(label, int | float) and label < -1:
            raise UserError(f"label {place} is {label}; classes are numbered from 0, and -1 is none")
    if any(isinstance(label, str) for label in labels):
        labels = [None if label is None else str(label) for label in labels]
    found = class_numbers(labels, names)
    if found.unused:
        raise UserError(found.unused)
    return found.numbers, found.classes


def _number(label: Any) -> Any:
    """A tensor or array of one number as that number; anything else as it is."""
    one = isinstance(label, Tensor | np.ndarray | np.generic) and _array(label).size == 1
    return _array(label).item() if one else label
