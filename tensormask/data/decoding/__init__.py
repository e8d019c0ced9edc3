"""From image files and pixel values of any format and type to 8-bit pixels."""
