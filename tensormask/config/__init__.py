"""Config options: the tree with its defaults, merged with YAML files and `KEY VALUE` pairs."""

from tensormask.config.defaults import get_cfg
from tensormask.config.node import CfgNode

__all__ = ["CfgNode", "get_cfg"]
