"""Annotation files in COCO's form: what stands where in which picture. They come from anybody, so all of it is checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from sharefold.data.preprocess import LARGEST_SIDE
from sharefold.data.same_names import matched
from sharefold.errors import SharefoldError
from sharefold.untrusted import is_int, is_number, parse_json, printable, quoted, read_text, shown

# Most bytes of a file. Those of COCO's 5,000 validation images are 20 MB, most of it outlines, which are not read.
LIMIT = 1 << 26
_LARGEST_ID = 1 << 31


@dataclass(frozen=True)
class Objects:
    """What stands in one picture.

    Attributes:
        boxes: (k, 4) float32, corners x1, y1, x2, y2 in pixels of the picture.
        categories: (k,) int64, their ids.
        crowds: (k,) int64, 1 where a box is of many objects: finding it is neither right nor wrong.
    """

    boxes: Tensor
    categories: Tensor
    crowds: Tensor


@dataclass
class _Picture:
    name: str
    size: tuple[int, int] | None  # height, width
    rows: list[tuple[float, float, float, float, int, int]] = field(default_factory=list)


class Annotations:
    """The objects of every picture.

    Args:
        pictures: image files in their order.
        listed: the file's pictures, one of them for each of ``pictures``.
        categories: id -> name.
        where: for messages.
    """

    def __init__(
        self, pictures: Sequence[PurePath], listed: Sequence[_Picture], categories: Mapping[int, str], where: str
    ) -> None:
        self.where, self.categories = where, dict(categories)
        order = matched(pictures, [PurePath(one.name) for one in listed], lambda path: path.name, where)
        if len(listed) > len(pictures):
            taken = set(order)
            first = next(one.name for index, one in enumerate(listed) if index not in taken)
            raise SharefoldError(
                f"{where}: {len(listed) - len(pictures)} of its {len(listed)} pictures are not among the data, such as "
                f"{shown(first)}: give all of them, or a file of those that there are"
            )
        self._pictures = [listed[index] for index in order]

    def objects(self, index: int, size: tuple[int, int]) -> Objects:
        """Of picture ``index``, which is of ``size`` (height, width).

        Raises:
            SharefoldError: the file says another size.
        """
        picture = self._pictures[index]
        if picture.size is not None and picture.size != size:
            raise SharefoldError(
                f"{self.where}: {shown(picture.name)} is {size[1]}x{size[0]} pixels, the file says "
                f"{picture.size[1]}x{picture.size[0]}: the boxes are of another picture"
            )
        rows = torch.tensor(picture.rows, dtype=torch.float64).reshape(-1, 6)
        boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1).float()
        return Objects(boxes, rows[:, 4].long(), rows[:, 5].long())


def read_annotations(file: Path, pictures: Sequence[PurePath]) -> Annotations:
    """The annotations in ``file`` of ``pictures``.

    Raises:
        SharefoldError: unreadable, larger than 64 MB, another form, a picture that the file does not list, one of the file that
            is not there, an annotation of an unknown picture or category.
    """
    where = f"truth {printable(str(file))}"
    found = parse_json(read_text(file, where, LIMIT), where, LIMIT)
    parts = [found.get(key) if isinstance(found, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) and all(isinstance(entry, dict) for entry in part) for part in parts):
        raise SharefoldError(f"{where} is no COCO annotation file: want lists images, annotations and categories in it")
    images, annotations, categories = parts
    names = _categories(categories or [], where)
    listed = _pictures(images or [], where)
    for number, entry in enumerate(annotations or []):
        _add(entry, listed, names, f"{where}: annotation {number}")
    return Annotations(pictures, list(listed.values()), names, where)


def _categories(entries: list[dict[str, Any]], where: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        key: Any = entry.get("id")
        name = entry.get("name")
        if not is_int(key) or not 0 <= key < _LARGEST_ID or key in names:
            raise SharefoldError(f"{where}: category {quoted(name)} has the id {quoted(key)}: want a whole number of its own")
        names[key] = name if isinstance(name, str) else str(key)
    if not names:
        raise SharefoldError(f"{where}: it has no categories: there is nothing to find")
    return names


def _pictures(entries: list[dict[str, Any]], where: str) -> dict[int | str, _Picture]:
    listed: dict[int | str, _Picture] = {}
    for entry in entries:
        key: Any = entry.get("id")
        name = entry.get("file_name")
        if not isinstance(name, str) or not (is_int(key) or isinstance(key, str)) or key in listed:
            raise SharefoldError(f"{where}: image {quoted(name)} has the id {quoted(key)}: want a file_name and an id of its own")
        size: Any = entry.get("height"), entry.get("width")
        listed[key] = _Picture(name, size if all(is_int(side) for side in size) else None)
    return listed


def _add(entry: dict[str, Any], listed: Mapping[int | str, _Picture], names: Mapping[int, str], where: str) -> None:
    image: Any = entry.get("image_id")
    category: Any = entry.get("category_id")
    box: Any = entry.get("bbox")
    crowd: Any = entry.get("iscrowd")
    if not (is_int(image) or isinstance(image, str)) or image not in listed:
        raise SharefoldError(f"{where} is of image {quoted(image)}, which is none of the file's images")
    if not is_int(category) or category not in names:
        raise SharefoldError(f"{where} is of category {quoted(category)}, which is none of the file's categories")
    numbers = isinstance(box, list) and len(box) == 4 and all(is_number(x) and abs(x) <= LARGEST_SIDE for x in box)
    if not numbers or min(box[2:]) < 0:
        raise SharefoldError(f"{where} has the bbox {quoted(box)}: want [x, y, width, height] in pixels")
    if crowd not in (None, 0, 1):
        raise SharefoldError(f"{where} has the iscrowd {quoted(crowd)}: want 0 or 1")
    listed[image].rows.append((*box, category, int(crowd or 0)))
