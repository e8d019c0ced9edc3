"""Files that are no images that can be read: what the error says of them."""

import pytest

from tensormask.data.images import ImageError, read_image


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (bytes(2000), "holds zeros only"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.* convert it to JPEG or PNG"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw photograph"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "video"),
        (b"RIFF\1\2\3\4AVI LIST", "video"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"\x93NUMPY\1\0v\0{'descr': '|u1'", "NumPy array.* give the array"),
        (b"%PDF-1.7", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="...">', "SVG"),
        (b"\n<!DOCTYPE html><html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "archive"),
        (b"GIF89a", "not an image that PIL can read"),
        (b"some text\n" * 50, "not an image that PIL can read"),
    ],
)
def test_what_is_said_of_a_file(tmp_path, content, message):
    """Whatever its suffix."""
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"a\.jpg .*{message}") as raised:
        read_image(path)
    assert raised.value.kind == "image_broken"
