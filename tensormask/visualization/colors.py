"""Colors of instances and classes."""

Color = tuple[int, int, int]

UNMATCHED = (255, 30, 30)  # red, which no instance has
# Each is as far as possible, in CIELAB, from the earlier ones; none is dark, pale or red.
_PALETTE = bytes.fromhex(
    "0087ff 00ff00 ffb469 00fff0 ff0096 c32dff e1f01e ffa5ff 78e178 a569f0"
    "ffc300 e1e178 e16996 ff3ce1 87e11e 00ff78 9687e1 00e1a5 e15ac3 00a5ff"
)


def instance_color(index: int) -> Color:
    """Return the RGB color of instance, or class, `index`; 20 colors repeat."""
    red, green, blue = _PALETTE[3 * (index % 20) :][:3]
    return red, green, blue
