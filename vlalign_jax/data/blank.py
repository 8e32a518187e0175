"""The picture that a model sees in place of one that is hidden from it."""

GREY = 127  # the value of every pixel
