"""Find config files: a path, or the name of a config that comes with the package."""

import os
from os import PathLike
from pathlib import Path

from tensormask.utils.errors import UserError, shorten, unknown_name
from tensormask.utils.files import expand_home

_PACKAGE = Path(__file__).parents[1]
# In an installed package, or in the repository.
CONFIGS = next(
    (path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()),
    _PACKAGE / "configs",
)


def config_names() -> list[str]:
    """Return the sorted names of the configs that come with the package, ablations last.

    Example:
        >>> "quickstart" in config_names(), "ablations/bipyramid" in config_names()
        (True, True)
    """
    paths = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml"))
    return sorted((path.as_posix() for path in paths), key=lambda name: ("/" in name, name))


def find_config(name: str | PathLike[str]) -> Path:
    """Return the path of a config file.

    Args:
        name: the path of a file. If no such file exists: a name in `config_names`, or this name as
            a path of the repository, such as ``configs/quickstart.yaml``.

    Raises:
        UserError: neither a file nor a name. The error names the nearest one.

    Example:
        >>> find_config("quickstart").name
        'quickstart.yaml'
    """
    text, names = expand_home(name), config_names()
    plain = text.replace("\\", "/").removeprefix("./").removeprefix("configs/")
    plain = plain.removesuffix(".yaml")
    if plain in names and not os.path.isfile(text):
        return CONFIGS / f"{plain}.yaml"
    if not os.path.exists(text):
        raise UserError(unknown_name("a file or the name of a config", shorten(text), names))
    return Path(text)
