"""Why an image was left out: a closed list of reason codes, so that no message can carry a path or a name."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "animated": "the file holds more than one frame or page",
    "archive_encrypted": "the file is encrypted inside a zip archive",
    "archive_nested": "the file is a zip archive inside a zip archive",
    "archive_unreadable": "the zip archive, or its compression, cannot be read",
    "bad_header": "the DICOM header makes no sense",
    "bad_pixel_data": "the pixel data are damaged or do not fit the header",
    "bad_pixel_header": "the attributes that describe the pixels are missing or contradict each other",
    "bad_window": "the rescale, the window or the look-up table of the file cannot be used",
    "blurred": "the photograph is out of focus",
    "burned_in": "the header says that text is burned into the pixels",
    "burned_in_unknown": "this kind of image often shows text, and the header does not say that this one has none",
    "converted": "the pixels were scanned, captured or made by a workstation (ConversionType)",
    "corrupt": "the file is damaged",
    "dicom": "the file is DICOM: use 'medpretrain prep dicom'",
    "dose_report": "the image is a page of a dose or protocol report",
    "duplicate": "the same image is in the dataset already",
    "duplicate_instance": "the same DICOM instance is in the dataset already",
    "empty": "the file has no bytes",
    "field_cut": "the frame cuts too much of the field of view",
    "file_too_large": "the file has more than 2 GiB",
    "missing": "the file is not on disk",
    "no_colour": "the image has no colour, so it is no colour photograph of a retina",
    "no_field_of_view": "no disc of a retinal photograph was found",
    "no_pixels": "the file holds no pixel data",
    "no_sop_class": "the DICOM file does not say what it holds (no SOP class)",
    "not_an_image": "the file is no image of a known format",
    "not_an_image_object": "the DICOM object is no image of a kind that is used",
    "not_dicom": "the file is not DICOM",
    "private_object": "the DICOM object is of a private or unknown SOP class",
    "screen_save": "the image is a saved screen, which shows the patient's name as a rule",
    "secondary_capture": "the image is a Secondary Capture, which shows the patient's name as a rule",
    "slide_label": "the image shows the label of a slide",
    "too_bright": "the photograph is overexposed",
    "too_dark": "the photograph is too dark",
    "too_large": "the image has more pixels than the decoder's limit",
    "truncated": "the file ends before the image does",
    "ultrasound_uncropped": "the ultrasound image cannot be cropped to its scan regions",
    "uneven_illumination": "too much of the field of view is too dark or overexposed",
    "unreadable": "the file could not be read from disk",
    "unsupported_mode": "the pixels cannot be kept as 8- or 16-bit gray or 8-bit RGB",
    "unsupported_transfer_syntax": "the pixel data are encoded in a way that cannot be decoded",
}


class Rejected(Exception):
    """One image cannot go into the dataset, for the reason `code`; the rest goes on.

    `detail` is one of our own constant phrases, never text from the file or from a library. Whoever knows the image's
    pseudonym may set `instance`, so that the quarantine can name it.
    """

    instance: str | None = None

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in REASONS, code
        self.code = code
        self.detail = detail
        self.message = REASONS[code] + (f": {detail}" if detail else "")
        super().__init__(self.message)
