"""What each public DICOM file is: how it is decoded by other means, its frames and window, and its images.

Native, RLE, lossless JPEG and gray JPEG-LS data are decoded by code of the tests; JPEG 2000 and colour JPEG-LS by
GDCM's reader of whole files; High-Throughput JPEG 2000 by Pillow; or there is an uncompressed copy of the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom

from tests.data_prep.dicom.other_decoders import gdcm_reader, jpeg_ls, lossless_jpeg, native, pillow, run_lengths

Stored = Callable[[pydicom.Dataset, Path], np.ndarray]
PERCENTILE = "percentile:1/99"


def same_as(name: str) -> Stored:
    """An uncompressed copy of the same image."""

    def read(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
        return native(pydicom.dcmread(path.with_name(name)), path)

    return read


# File -> (how its stored values are found, frames, window), or the reason why it is left out.
ACCEPTED: dict[str, tuple[Stored, int, str]] = {
    "693_J2KR": (gdcm_reader, 1, "stored:40/100"),
    "HTJ2K_08_RGB": (pillow, 1, "none"),
    "JLSL_08_07_0_1F": (jpeg_ls, 1, PERCENTILE),
    "JLSL_16_15_1_1F": (jpeg_ls, 1, PERCENTILE),
    "JLSL_RGB_ILV0": (gdcm_reader, 1, "none"),
    "JLSL_RGB_ILV1": (gdcm_reader, 1, "none"),
    "JLSL_RGB_ILV2": (gdcm_reader, 1, "none"),
    "JLSN_RGB_ILV0": (gdcm_reader, 1, "none"),
    "JPEG-LL": (lossless_jpeg, 1, PERCENTILE),
    "JPGLosslessP14SV1_1s_1f_8b": (lossless_jpeg, 1, "stored:127/254"),
    "MR2_J2KI": (gdcm_reader, 1, "stored:1000/2000"),
    "OBXXXX1A_2frame": (native, 2, "none"),
    "OBXXXX1A_rle": (run_lengths, 1, "none"),
    "OBXXXX1A_rle_2frame": (run_lengths, 2, "none"),
    "RG3_J2KI": (gdcm_reader, 1, "stored:550/1024"),
    "SC_rgb": (native, 1, "none"),
    "SC_rgb_16bit": (native, 1, "scaled:16"),
    "SC_rgb_16bit_2frame": (native, 2, "scaled:16"),
    "SC_rgb_2frame": (native, 2, "none"),
    "SC_rgb_dcmtk_ebcr_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcyn1_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcyn2_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcynp_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcys2_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcys4_dcmd": (native, 1, "none"),
    "SC_rgb_expb": (native, 1, "none"),
    "SC_rgb_expb_16bit": (native, 1, "scaled:16"),
    "SC_rgb_expb_16bit_2frame": (native, 2, "scaled:16"),
    "SC_rgb_expb_2frame": (native, 2, "none"),
    "SC_rgb_gdcm2k_uncompressed": (native, 1, "none"),
    "SC_ybr_full_uncompressed": (native, 1, "none"),
    "US1_J2KI": (gdcm_reader, 1, "none"),
    "US1_J2KR": (gdcm_reader, 1, "none"),
    "bad_sequence": (lossless_jpeg, 1, "stored:40/350"),
    "color-pl": (native, 1, "none"),
    "color-px": (native, 1, "none"),
    "emri_small": (native, 10, PERCENTILE),
    "emri_small_RLE": (run_lengths, 10, PERCENTILE),
    "emri_small_big_endian": (same_as("emri_small.dcm"), 10, PERCENTILE),
    "emri_small_jpeg_2k_lossless": (same_as("emri_small.dcm"), 10, PERCENTILE),
    "emri_small_jpeg_ls_lossless": (same_as("emri_small.dcm"), 10, PERCENTILE),
    "explicit_VR-UN": (gdcm_reader, 1, PERCENTILE),
    "liver": (native, 3, "none"),
    "liver_expb": (same_as("liver.dcm"), 3, "none"),
    "liver_j2k": (same_as("liver.dcm"), 3, "none"),
    "liver_nonbyte_aligned": (native, 3, "none"),
    "liver_nonbyte_aligned_j2k": (same_as("liver_nonbyte_aligned.dcm"), 3, "none"),
    "mlut_18": (native, 1, PERCENTILE),
    "parametric_map_double_float": (native, 1, PERCENTILE),
    "parametric_map_float": (native, 1, PERCENTILE),
    "vlut_04": (native, 1, "stored:lut"),
}
REJECTED = {
    "OT-PAL-8-face": "unsupported_transfer_syntax",  # no file meta information
    "SC_rgb_32bit": "unsupported_mode",
    "SC_rgb_32bit_2frame": "unsupported_mode",
    "SC_rgb_expb_32bit": "unsupported_mode",
    "SC_rgb_expb_32bit_2frame": "unsupported_mode",
    "emri_small_jpeg_2k_lossless_too_short": "no_pixels",  # pydicom parses nothing of it
    "liver_deflate": "unsupported_transfer_syntax",
    "liver_nonbyte_aligned_deflate": "unsupported_transfer_syntax",
    "liver_nonbyte_aligned_rle": "unsupported_transfer_syntax",
    "liver_rle": "unsupported_transfer_syntax",
}


def expected(dataset: pydicom.Dataset, stored: np.ndarray, window: str, top: int) -> Iterator[np.ndarray]:
    """The images by the equations of the standard, frame by frame."""
    if stored.shape[-1] == 3:
        for image in stored:
            if dataset.PhotometricInterpretation == "YBR_FULL":
                y, cb, cr = (image[..., i].astype(np.float64) for i in range(3))
                cb, cr = cb - 128, cr - 128
                red, blue = y + 1.402 * cr, y + 1.772 * cb
                green = (y - 0.299 * red - 0.114 * blue) / 0.587
                image = np.clip(np.floor(np.stack([red, green, blue], axis=-1) + 0.5), 0, 255)
            yield image >> 8 if window == "scaled:16" else image
        return
    for image in stored[..., 0]:
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            words = [dataset[f"{c}PaletteColorLookupTableData"].value for c in ("Red", "Green", "Blue")]
            yield np.stack([np.frombuffer(data, "<u2")[image] >> 8 for data in words], axis=-1)
            continue
        if window == "none":
            yield image.astype(np.int64) * top
            continue
        values = image.astype(np.float64) * float(dataset.get("RescaleSlope", 1)) + float(
            dataset.get("RescaleIntercept", 0)
        )
        if "ModalityLUTSequence" in dataset:
            item = dataset.ModalityLUTSequence[0]
            values = np.array(item.LUTData)[image.astype(int) - item.LUTDescriptor[1]].astype(np.float64)
        if window.startswith("percentile:"):
            real = values[image != dataset.get("PixelPaddingValue")]
            low, high = np.percentile(real, [float(part) for part in window[11:].split("/")], method="inverted_cdf")
            bright = (values - low) / (high - low) if high > low else np.zeros_like(values)
        elif window == "stored:lut":
            item = dataset.VOILUTSequence[0]
            bright = np.array(item.LUTData)[image - item.LUTDescriptor[1]] / (2 ** item.LUTDescriptor[2] - 1)
        else:
            centre, width = map(float, window.rpartition(":")[2].split("/"))
            bright = (values - (centre - 0.5)) / (width - 1) + 0.5
        gray = np.rint(np.clip(bright, 0, 1) * top)
        yield top - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray
