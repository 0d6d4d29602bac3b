"""Base64 text given as a picture: the error says what it is and how to decode it, and following the advice works."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mg_fast import PictureError, cli
from mg_fast.models.base64_text import decode_base64, looks_like_base64
from mg_fast.models.pictures import open_picture

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")


def picture(side=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def stored(kind, side=40):
    out = io.BytesIO()
    picture(side).save(out, kind)
    return out.getvalue()


WRITTEN = {
    "text": lambda data: base64.b64encode(data).decode(),
    "lines": lambda data: base64.encodebytes(data).decode(),
    "Windows lines": lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    "URL-safe": lambda data: base64.urlsafe_b64encode(data).decode(),
    "no padding": lambda data: base64.b64encode(data).decode().rstrip("="),
    "space before": lambda data: "\n  " + base64.b64encode(data).decode(),
    "bytes": base64.b64encode,
    "bytes with lines": base64.encodebytes,
    "bytearray": lambda data: bytearray(base64.urlsafe_b64encode(data)),
    "memoryview": lambda data: memoryview(base64.b64encode(data)),
    "file": lambda data: io.BytesIO(base64.b64encode(data)),
    "text file": lambda data: io.StringIO(base64.b64encode(data).decode()),
    "str of bytes": lambda data: str(base64.b64encode(data)),
    "data URI": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    "data URI in capitals": lambda data: "DATA:image/png;BASE64," + base64.b64encode(data).decode(),
    "bytes of a data URI": lambda data: b"data:image/png;base64," + base64.b64encode(data),
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("kind", FORMATS)
def test_the_error_says_base64(kind, written):
    data = stored(kind)
    for side in (6, 40):
        with pytest.raises(PictureError, match="this is base64 text .*base64.b64decode.*`base64` key of a message"):
            open_picture(WRITTEN[written](stored(kind, side)))
    with pytest.raises(PictureError, match="base64"):
        open_picture(WRITTEN[written](data[:100]))


def test_files_on_disk(tmp_path):
    (tmp_path / "a.png").write_bytes(base64.encodebytes(stored("PNG")))
    with pytest.raises(PictureError, match=f"^{tmp_path}/a.png: this is base64 text"):
        open_picture(tmp_path / "a.png")


def test_of_no_known_format(tmp_path):
    """A long text of base64 characters alone is not taken for a path, whatever it decodes to."""
    with pytest.raises(PictureError, match="base64"):
        open_picture(base64.b64encode(np.random.default_rng(0).bytes(3000)).decode())
    with pytest.raises(PictureError, match="base64"):
        open_picture(base64.encodebytes(np.random.default_rng(0).bytes(3000)).decode())


@pytest.mark.parametrize(
    "path",
    [
        "iVBORw.png",
        "/9j/photo.jpg",
        "photos/2024/a.png",
        "Qk0",
        "BM",
        "R0lGOD/x.gif",
        "a" * 200,
        "/".join(["abcdefgh"] * 30) + ".jpeg",
        "P6",
        "",
        "What is in this picture " * 20,
        "What is in this picture 1 " * 20,
        "what" * 100,
        "QUJD" * 1000,
        "WhatIsInThisPicture" * 20,
        "What\tis\tin\tthis\tpicture\t1" * 20,
        "~nobody\ud800/a.png",
        "~nobody\0/a.png",
    ],
)
def test_paths_are_paths(path):
    assert not looks_like_base64(path)
    with pytest.raises(PictureError, match="no such file"):
        open_picture(path)


@pytest.mark.parametrize(
    "data", [b"This is no picture, it is a text of words.", b"", b"<svg></svg>", b"\x00" * 400, bytes(range(256))]
)
def test_other_bytes_are_not_named_so(data):
    with pytest.raises(PictureError, match="not a picture that Pillow can read"):
        open_picture(data)


@pytest.mark.parametrize("written", [name for name in WRITTEN if "file" not in name and name != "str of bytes"])
@pytest.mark.parametrize("kind", ("PNG", "BMP"))
def test_as_the_base64_key_of_a_message(processor, written, kind):
    """The `base64` key of a message takes such text, as the error message advises."""
    data, text = stored(kind), WRITTEN[written](stored(kind))
    part = {"type": "image", "base64": text}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert (found["pixel_values_hr"] == processor.image_processor(data)["pixel_values_hr"]).all()


def test_data_uris_where_they_are_fetched():
    data = stored("PNG")
    text = base64.b64encode(data).decode()
    quoted = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    percent = "".join(f"%{byte:02x}" for byte in data)
    for uri in (
        f"data:image/png;base64,{text}",
        f"data:image/png;base64,{quoted}",
        f"data:;base64,{base64.urlsafe_b64encode(data).decode().rstrip('=')}",
        f"data:image/png;base64,{base64.encodebytes(data).decode()}",
        f"DATA:image/png;charset=utf-8;BASE64,{text}",
        f"data:image/png,{percent}",
    ):
        assert np.array_equal(np.asarray(open_picture(uri, allow_urls=True)), np.asarray(picture())), uri[:40]
    for uri in ("data:image/png;base64,a", "data:image/png;base64,????", "data:image/png;base64,"):
        with pytest.raises(PictureError):
            open_picture(uri, allow_urls=True)


def test_decoding_drops_nothing():
    for length in range(200):
        data = np.random.default_rng(length).bytes(length)
        for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes):
            assert decode_base64(encode(data)) == decode_base64(encode(data).decode().rstrip("=\n")) == data
    for text in ("a", "ab!d", "abcd\u00e9", "ab=cd"):
        with pytest.raises(ValueError, match="not base64 text"):
            decode_base64(text)


def test_the_command_line(standard, capsys):
    text = base64.b64encode(stored("PNG")).decode()
    for image in (text, "data:image/png;base64," + text):
        assert cli.main(["run", "--model", str(standard), "--prompt", "What?", "--image", image]) == 4
        error = capsys.readouterr().err
        assert "base64" in error and len(error) < 520


@pytest.mark.parametrize("scheme", ("data", "DATA", "Data"))
def test_the_command_line_takes_the_urls_that_the_library_takes(standard, capsys, scheme):
    uri = f"{scheme}:image/png;base64,{base64.b64encode(stored('PNG')).decode()}"
    words = [
        "run",
        "--model",
        str(standard),
        "--prompt",
        "What?",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        "--image",
        uri,
    ]
    assert cli.main([*words, "--allow-urls"]) == 0
    assert cli.main(words) == 4 and "URLs are fetched only when asked for" in capsys.readouterr().err


@pytest.mark.parametrize("image", ("HTTPS://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png"))
def test_the_command_line_fetches_urls_in_capitals(standard, capsys, image):
    words = ["run", "--model", str(standard), "--prompt", "What?", "--image", image]
    assert cli.main([*words, "--allow-urls"]) == 4 and "cannot be fetched or decoded" in capsys.readouterr().err
    assert cli.main(words) == 4 and "URLs are fetched only when asked for" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [
    ("url", "https://a\ud800b/c.png"), ("url", "data:image/png,\udcff"), ("url", "data:image/png;base64,\ud800"),
    ("base64", "\ud800"), ("base64", "iVBORw0KGgo\udcff"), ("path", "\ud800"), ("path", "~\ud800/a.png"),
])  # fmt: skip
def test_surrogates(processor, key, value):
    messages = [{"role": "user", "content": [{"type": "image", key: value}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(PictureError):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    with pytest.raises(PictureError):
        open_picture(value, allow_urls=True)
