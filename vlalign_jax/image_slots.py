"""The slots of tokens at which no embedding of a tile stands: of text, and of ends of lines."""

TEXT = -1  # an ordinary token, such as a marker before the picture
NEWLINE = -2  # the model's learned embedding of the end of a line of patches
