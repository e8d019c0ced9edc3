"""Options: their defaults, and the files and `KEY VALUE` pairs that change them."""

from tensormask.config.defaults import get_cfg
from tensormask.config.node import CfgNode

__all__ = ["CfgNode", "get_cfg"]
