"""Why an image was left out: a closed list of reason codes, so that no message can carry a path or a name."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "animated": "the file holds more than one frame or page",
    "bad_pixel_data": "the pixel data are damaged or do not fit the header",
    "bad_pixel_header": "the attributes that describe the pixels are missing or contradict each other",
    "bad_window": "the rescale, the window or the look-up table of the file cannot be used",
    "corrupt": "the file is damaged",
    "dicom": "the file is DICOM: use 'medpretrain prep dicom'",
    "empty": "the file has no bytes",
    "no_pixels": "the file holds no pixel data",
    "not_an_image": "the file is no image of a known format",
    "too_large": "the image has more pixels than the decoder's limit",
    "truncated": "the file ends before the image does",
    "unreadable": "the file could not be read from disk",
    "unsupported_mode": "the pixels cannot be kept as 8- or 16-bit gray or 8-bit RGB",
    "unsupported_transfer_syntax": "the pixel data are encoded in a way that cannot be decoded",
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
