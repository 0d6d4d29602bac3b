"""The fonts of nano's print: Pillow's own, those of matplotlib, and those of packages that hold nothing but fonts."""

import functools
import importlib.util
from pathlib import Path

import matplotlib
from PIL import ImageFont

# The fonts of ordinary scenes. Names are files of matplotlib; None is Pillow's own font.
FONTS = (
    None,
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "cmtt10.ttf",
)
# Further fonts of varied scenes. A name with a slash is a file of an installed package.
MORE_FONTS = (
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "font_caladea/Caladea-Regular.ttf",
    "font_caladea/Caladea-Bold.ttf",
    "font_manrope/Manrope-Regular.ttf",
    "font_manrope/Manrope-Bold.ttf",
    "font_source_sans_pro/SourceSansPro-Regular.ttf",
    "font_source_sans_pro/SourceSansPro-Bold.ttf",
)
# Training never shows these, so that the evaluation can tell how nano reads a font that it does not know.
UNKNOWN_FONTS = (
    "font_hanken_grotesk/HankenGrotesk-Regular.otf",
    "font_hanken_grotesk/HankenGrotesk-Bold.otf",
    "font_source_serif_pro/SourceSerifPro-Regular.ttf",
    "font_source_serif_pro/SourceSerifPro-Bold.ttf",
)


def font_file(name: str) -> Path:
    """The file of a font of matplotlib or of a package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package, _, file = name.rpartition("/")
    if not package:
        return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        needed = package.replace("_", "-")
        raise ModuleNotFoundError(f"the font {file} is in the package {needed}, which is missing: pip install {needed}")
    return Path(spec.origin).parent / "files" / file


@functools.cache
def font_of(name: str | None, height: float) -> ImageFont.FreeTypeFont:
    """A font whose digits are `height` pixels high."""

    def of(size: float) -> ImageFont.FreeTypeFont:
        return ImageFont.load_default(size) if name is None else ImageFont.truetype(str(font_file(name)), size)

    _, top, _, bottom = of(100).getbbox("0123456789")
    return of(height * 100 / (bottom - top))


@functools.cache
def advance_of(font: ImageFont.FreeTypeFont, character: str) -> float:
    """How far a character moves the pen, in pixels."""
    return font.getlength(character)
