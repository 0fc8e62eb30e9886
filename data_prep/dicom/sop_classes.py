"""What kind of thing a DICOM object is, by its SOP class: a closed table over the storage classes of PS3.4 B.5.

- ACQUIRED: the detector's own pixels. Text in them is the exception, which BurnedInAnnotation then declares; where
  that is absent the image is taken.
- SUSPECT: cameras, endoscopes, C-arms, portal imagers, which often write a name or a date into the picture. Taken
  only where BurnedInAnnotation says NO.
- ULTRASOUND: the scanner's screen with its banner. Taken when cropped to the scan regions.
- CAPTURED: screens, scanned film, converted video. Taken only where a human has looked.

The standard's other classes (segmentations, reports, waveforms, presentation states, structures, videos, security
scans, ...) are no image here; a class that the standard does not know is private.
"""

from __future__ import annotations

from enum import Enum

from pydicom.uid import UID_dictionary

_ROOT = "1.2.840.10008.5.1.4.1.1."


class Kind(Enum):
    ACQUIRED = "acquired"
    SUSPECT = "suspect"
    ULTRASOUND = "ultrasound"
    CAPTURED = "captured"
    NO_IMAGE = "no image"
    PRIVATE = "private"


_KINDS: dict[Kind, str] = {
    # CR; DX, MG, intra-oral; CT; MR; NM; 3D angiography, breast tomosynthesis and projection; OPT, en face; PET
    Kind.ACQUIRED: """
        1 1.1 1.1.1 1.2 1.2.1 1.3 1.3.1 2 2.1 2.2 4 4.1 4.3 4.4 5 20 13.1.1 13.1.2 13.1.3 13.1.4 13.1.5
        77.1.5.4 77.1.5.7 128 128.1 130
    """,
    # XA and RF; intravascular OCT; visible light, ophthalmic photography, slides, skin, confocal; RT images
    Kind.SUSPECT: """
        12.1 12.1.1 12.2 12.2.1 12.3 14.1 14.2 77.1 77.2 77.1.1 77.1.2 77.1.3 77.1.4 77.1.5.1 77.1.5.2 77.1.5.5 77.1.5.6
        77.1.6 77.1.7 77.1.8 77.1.9 481.1 481.23 481.24
    """,
    # multi-frame and still, retired and current; volume; photoacoustic
    Kind.ULTRASOUND: "3 3.1 6 6.1 6.2 6.3",
    Kind.CAPTURED: "7 7.1 7.2 7.3 7.4",
}
_KIND_OF = {_ROOT + end: kind for kind, ends in _KINDS.items() for end in ends.split()}
_KIND_OF |= dict.fromkeys(("1.2.840.10008.5.1.1.29", "1.2.840.10008.5.1.1.30"), Kind.CAPTURED)  # hardcopy


def kind_of(uid: str) -> Kind:
    """The kind of a SOP class UID.

    >>> kind_of("1.2.840.10008.5.1.4.1.1.2").name, kind_of("1.2.840.10008.5.1.4.1.1.66.4").name, kind_of("1.2.3").name
    ('ACQUIRED', 'NO_IMAGE', 'PRIVATE')
    """
    if uid in _KIND_OF:
        return _KIND_OF[uid]
    return Kind.NO_IMAGE if standard_name(uid) else Kind.PRIVATE


def standard_name(uid: str) -> str:
    """The standard's name of a SOP class, from pydicom's dictionary and never from a file; "" where it has none."""
    entry = UID_dictionary.get(uid)
    return entry[0] if entry is not None and entry[1] == "SOP Class" else ""
