"""Why an image was left out: a closed list of reason codes, so that no message can carry a path or a name."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "animated": "the file holds more than one frame or page",
    "blurred": "the photograph is out of focus",
    "corrupt": "the file is damaged",
    "dicom": "the file is DICOM: use 'medpretrain prep dicom'",
    "empty": "the file has no bytes",
    "field_cut": "the frame cuts too much of the field of view",
    "no_colour": "the image has no colour, so it is no colour photograph of a retina",
    "no_field_of_view": "no disc of a retinal photograph was found",
    "not_an_image": "the file is no image of a known format",
    "too_bright": "the photograph is overexposed",
    "too_dark": "the photograph is too dark",
    "too_large": "the image has more pixels than the decoder's limit",
    "truncated": "the file ends before the image does",
    "uneven_illumination": "too much of the field of view is too dark or overexposed",
    "unreadable": "the file could not be read from disk",
    "unsupported_mode": "the pixels cannot be kept as 8- or 16-bit gray or 8-bit RGB",
}


class Rejected(Exception):
    """One image cannot go into the dataset, for the reason `code`; the rest goes on.

    `detail` is one of our own constant phrases, never text from the file or from a library.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in REASONS, code
        self.code = code
        self.message = REASONS[code] + (f": {detail}" if detail else "")
        super().__init__(self.message)
