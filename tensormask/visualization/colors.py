"""Colors of instances and classes."""

Color = tuple[int, int, int]

UNMATCHED = (255, 30, 30)  # red, which no instance has
# Each is as far as possible, in CIELAB, from the earlier ones; none is dark, pale or red.
# The first 20 are bright.
_PALETTE = bytes.fromhex(
    "0087ff 00ff00 ffb469 00fff0 ff0096 c32dff e1f01e ffa5ff 78e178 a569f0"
    "ffc300 e1e178 e16996 ff3ce1 87e11e 00ff78 9687e1 00e1a5 e15ac3 00a5ff"
    "1ec3e1 2d4bff b4694b a58700 69a569 78a51e 00a596 00a500 2d69a5 a5f0b4"
    "ff9696 a5a55a 874ba5 2d5ae1 b4b400 a51ec3 a54b5a c30f69 00a54b b478b4"
    "ffa5d2 c3f05a e1960f 00d200 b4782d a53c87 ff00ff ffd25a a5d278 f078ff"
    "5ac3ff 782dff 96b4ff c300a5 3c69c3 87ff69 00ffa5 874bf0 2df0ff d2b4ff"
    "ffe196 c378e1 69d2b4 87ff00 00b487 ff5aa5 0fd25a a53cb4 96c300 d25aff"
    "ffe100 d2a569 7878f0 c30f87 69c33c 78ffd2 ff87d2 f0e14b 5ac378 0096d2"
)


def instance_color(index: int) -> Color:
    """Return the RGB color of instance, or class, `index`; 80 colors repeat."""
    red, green, blue = _PALETTE[3 * (index % 80) :][:3]
    return red, green, blue
