"""What a label column may say: versioned vocabularies of modality and anatomy, and the map from classes to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml.comments import CommentedMap

from data_prep.errors import UserError, nearest
from data_prep.yaml_file import place, read_mapping

UNKNOWN = -1
VOCABULARY_VERSION = 1
# An id is a place in these lists: add at the end only, and raise VOCABULARY_VERSION.
VOCABULARIES: dict[str, tuple[str, ...]] = {
    "modality": ("CT", "MR", "US", "OP", "OPT", "CR", "DX", "MG"),
    "anatomy": (
        "abd",
        "lung",
        "af",
        "brain",
        "hip",
        "knee",
        "shoulder",
        "spine",
        "thyroid",
        "eye",
        "breast",
        "hand",
    ),
}
EVERY_CLASS = "*"


@dataclass(frozen=True)
class LabelColumn:
    """One label of every image: `ids` (N,) int32 are places in `names`, -1 where unknown; `source` says whence."""

    names: list[str]
    ids: np.ndarray
    source: str
    version: int = VOCABULARY_VERSION


@dataclass(frozen=True)
class ClassMap:
    """A labels file: class name -> {vocabulary: id}; `*` stands for every class without an entry of its own.

    `origin` is what a dataset may say of it: the user's own file name stays out.
    """

    name: str
    origin: str
    digest: str
    classes: dict[str, dict[str, int]]
    places: dict[str, str] = field(repr=False)


def shipped_folder() -> Path:
    """Where the labels files that come with medpretrain lie: in an installed wheel, or in a checkout."""
    root = Path(__file__).resolve().parent.parent
    installed = root / "medpretrain" / "configs" / "labels"
    return installed if installed.is_dir() else root / "configs" / "labels"


def load_class_map(choice: str) -> ClassMap:
    """Read a labels file, given by path or by the name of a shipped one (`mednist`).

    Raises:
        UserError: no such file; or a line of it says something unknown, with the file, the line and the nearest name.
    """
    path = Path(choice)
    shipped = path.suffix not in (".yaml", ".yml")
    if shipped:
        folder = shipped_folder()
        path = folder / f"{choice}.yaml"
        if not path.is_file():
            hint = nearest(choice, sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"--labels: no labels file is called {choice!r}{hint} (or give the path of a .yaml file)")
    content = read_mapping(path)
    classes: dict[str, dict[str, int]] = {}
    places: dict[str, str] = {}
    for key, entry in content.items():
        where = place(path, content, key)
        classes[str(key)] = _entry(path, entry, where)
        places[str(key)] = where
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    origin = f"{choice} (sha256 {digest[:16]})" if shipped else f"sha256 {digest[:16]}"
    return ClassMap(path.stem, origin, digest, classes, places)


def _entry(path: Path, entry: Any, where: str) -> dict[str, int]:
    """One class's ids by vocabulary."""
    if not isinstance(entry, CommentedMap):
        raise UserError(f"{where}: must be a map such as {{modality: CT, anatomy: lung}}")
    ids: dict[str, int] = {}
    for vocabulary, name in entry.items():
        line = place(path, entry, vocabulary)
        if vocabulary not in VOCABULARIES:
            raise UserError(f"{line}: unknown key {str(vocabulary)!r}{nearest(str(vocabulary), VOCABULARIES)}")
        ids[vocabulary] = vocabulary_id(vocabulary, str(name), line)
    return ids


def vocabulary_id(vocabulary: str, name: str, place: str) -> int:
    """The id of a modality or anatomy.

    Raises:
        UserError: the vocabulary has no such name; `place` opens the message.
    """
    names = VOCABULARIES[vocabulary]
    if name not in names:
        raise UserError(f"{place}: unknown {vocabulary} {name!r}{nearest(name, names)}")
    return names.index(name)


def apply_class_map(
    class_map: ClassMap, classes: LabelColumn | None, count: int
) -> tuple[dict[str, LabelColumn], list[str]]:
    """Modality and anatomy of `count` images from their classes, and warnings on classes that have no entry.

    Raises:
        UserError: the file names a class that the data do not have while one of theirs has no entry (most likely a
            slip of the pen), or the data have no classes and the file no `*`.
    """
    mapped = class_map.classes
    everything = mapped.get(EVERY_CLASS)
    names = classes.names if classes is not None else []
    missing = [name for name in names if name not in mapped] if everything is None else []
    extra = [name for name in mapped if name != EVERY_CLASS and name not in names]
    if classes is None and everything is None:
        raise UserError(
            f"--labels {class_map.name}: the images have no classes to look up; an entry '*' would stand for all"
        )
    if missing and extra:
        name = extra[0]
        raise UserError(f"{class_map.places[name]}: the data have no class {name!r}{nearest(name, missing)}")
    source = f"class, by labels file {class_map.origin}"
    columns: dict[str, LabelColumn] = {}
    for vocabulary, choices in VOCABULARIES.items():
        default = UNKNOWN if everything is None else everything.get(vocabulary, UNKNOWN)
        # One place more than there are classes: index -1, the unknown class, finds the default there.
        table = np.full(len(names) + 1, default, np.int32)
        for number, name in enumerate(names):
            if name in mapped:
                table[number] = mapped[name].get(vocabulary, UNKNOWN)
        ids = table[classes.ids] if classes is not None else np.full(count, default, np.int32)
        columns[vocabulary] = LabelColumn(list(choices), ids, source)
    warnings = []
    if missing:
        assert classes is not None
        images = int(np.isin(classes.ids, [names.index(name) for name in missing]).sum())
        listed = ", ".join(repr(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.append(
            f"{len(missing)} of {len(names)} classes ({listed}; {images} images) have no entry in the labels file "
            f"{class_map.name}: their modality and anatomy stay unknown"
        )
    return columns, warnings
