"""A hook of MkDocs: a page that loads something from the network is a warning."""

import logging
import re

LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"']?(?:https?:)?//[^\s\"'>]*"
    r"|<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*href=[\"']?(?:https?:)?//[^\s\"'>]*"
)

logger = logging.getLogger("mkdocs.hooks.offline")


def on_post_page(output: str, page, **_) -> None:
    for tag in LOADED.findall(output):
        logger.warning(f"{page.file.src_uri} needs the network: {tag}")
