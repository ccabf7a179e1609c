"""A whole small model in one HTML file, which runs in the browser without a server."""

from llava_lab.page.build import Built, write_page

__all__ = ["Built", "write_page"]
