"""An extension of griffe: `Example:` of our docstrings is Google's `Examples:`."""

import re

import griffe


class Examples(griffe.Extension):
    """Let the examples be shown as code."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
