"""DICOM in: walk, de-identify, decode."""
