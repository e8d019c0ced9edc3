"""Recognizes files that are given as images but are not in a format that is read."""

import os
import re

_CONVERT = "convert it to JPEG or PNG"
# The first bytes of a file, what it is, and what to do with it.
_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), name, mend)
    for pattern, name, mend in (
        (rb"\Z", "is empty", "copy or download it again"),
        (rb"\0+\Z", "holds zeros only", "copy or download it again"),
        (rb".{4}ftyp(hei|hev|mif1|msf1)", "is in the format HEIC (of iPhones)", _CONVERT),
        (rb".{4}ftypavi[fs]", "is in the format AVIF, which this PIL does not read", _CONVERT),
        (rb".{4}ftypcrx ", "is a raw photograph (CR3)", _CONVERT),
        (rb".{4}ftyp", "is a video", "extract its frames; tensormask predict takes videos"),
        (rb"RIFF.{4}AVI |\x1aE\xdf\xa3", "is a video", "extract its frames"),
        (rb"\xff\x0a|.{4}JXL ", "is in the format JPEG XL", _CONVERT),
        (rb"FUJIFILMCCD-RAW|II(RO|RS|U\0)|IIII", "is a raw photograph", _CONVERT),
        (rb".{128}DICM", "is in the format DICOM", f"{_CONVERT}, for example with pydicom"),
        (rb"\x93NUMPY", "is a NumPy array", "load it and give the array, or save it as PNG"),
        (rb"\x89HDF", "is in the format HDF5", "save its images as PNG or TIFF"),
        (rb"SIMPLE  =", "is in the format FITS", "save it as TIFF"),
        (rb"\x76\x2f\x31\x01", "is in the format OpenEXR", _CONVERT),
        (rb"#\?R(ADIANC|GB)E", "is in the format Radiance HDR", _CONVERT),
        (rb"%PDF", "is in the format PDF", "render its pages as PNG"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "is in the format EPS", "render it as PNG"),
        (rb"\s*<(\?xml.*<)?svg", "is in the format SVG", "render it as PNG"),
        (rb"(?i)\s*<(!doctype )?html", "is a web page", "download the image itself"),
        (rb"version https://git-lfs", "is a pointer of Git LFS", "run git lfs pull"),
        (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "is an archive", "unpack it"),
    )
)
_NUM_BYTES = 512
# Suffixes of images that are not read, in folders.
UNREAD_SUFFIXES = frozenset(
    ".heic .heif .jxl .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .dcm .exr .hdr .svg .pdf .eps "
    ".npy .fits .nii .czi .nd2 .lif .svs".split()
)


def describe_format(path: str | os.PathLike[str]) -> str:
    """Return what a file is that PIL cannot read, with what to do: the end of a sentence on it."""
    with open(path, "rb") as file:
        start = file.read(_NUM_BYTES)
    for pattern, name, mend in _SIGNATURES:
        if pattern.match(start):
            return f"{name}, not an image that can be read: {mend}"
    return "is not an image that PIL can read"
