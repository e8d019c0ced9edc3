"""Config options: the tree with its defaults, merged with YAML files and `KEY VALUE` pairs."""

from tensormask.config.defaults import get_cfg
from tensormask.config.files import config_names, find_config
from tensormask.config.node import CfgNode

__all__ = ["CfgNode", "config_names", "find_config", "get_cfg"]
