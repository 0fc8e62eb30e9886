"""The pictures of sources that were set aside, read once more from where the link table says they are."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_prep.dicom.decode import read_layout
from data_prep.dicom.header import read_whole, silenced
from data_prep.dicom.pixels import frames
from data_prep.dicom.walk import SEPARATOR, read
from data_prep.dicom.windows import parse_window
from data_prep.images import read_file
from data_prep.quarantine import Rejected
from data_prep.samples import decoded

LAST_FRAME = 100  # all frames before the one that is shown have to be decoded
_FILES = ("files", "retina", "radimagenet")
_WINDOW = parse_window("percentile")


class Scene(NamedTuple):
    """One picture of a source: frame `frame`, from 0, of `frames`."""

    image: Image.Image
    frame: int = 0
    frames: int = 1


class NoPicture(Exception):
    """Why there is none: a constant phrase."""


def scene(kind: str, root: str, path: str, linked: float) -> Scene:
    """The picture of a source; of several frames the middle one, or a nearer one where that is far.

    DICOM is shown whole, whatever would be cropped, and windowed by percentiles.

    Args:
        kind: what dataset.json calls the kind of source.
        root: of the link table.
        path: of the link table.
        linked: when the link table was written, in seconds; a file that changed since may be another image.

    Raises:
        NoPicture: with the reason.
    """
    if kind == "npz":
        raise NoPicture("it is an array inside an .npz file")
    assert kind == "dicom" or kind in _FILES, kind
    folder = Path(root)
    name = next((name for name in _names(path) if os.path.lexists(_file(folder, name))), None)
    if name is None:
        raise NoPicture("the source is not there")
    try:
        if os.stat(_file(folder, name)).st_mtime > linked:
            raise NoPicture("the source was changed since")
        return _dicom(folder, name) if kind == "dicom" else Scene(decoded(read_file(folder, name)))
    except Rejected:
        raise NoPicture("its pixels cannot be decoded") from None
    except OSError:  # a link to nowhere, a folder that may not be read
        raise NoPicture("the source cannot be read") from None


def _dicom(root: Path, name: bytes) -> Scene:
    with silenced():
        dataset = read_whole(read(root, name))
        count = read_layout(dataset).frames
        number = min(count // 2, LAST_FRAME)
        found = frames(dataset, choice=_WINDOW, bits=8, modality=None, anatomy=None)
        frame = next(islice(found, number, None))
    return Scene(Image.fromarray(frame.pixels), number, count)


def _file(root: Path, name: bytes) -> bytes:
    """The file on disk, which may be an archive that the source is in."""
    return os.path.join(os.fsencode(root), name.partition(SEPARATOR)[0])


def _names(path: str) -> tuple[bytes, bytes]:
    r"""What a name in the link table may be on disk: bytes that are no UTF-8 stand there as \xNN."""
    plain = path.encode("utf-8", "surrogateescape")
    return plain, re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), plain)
