"""What stands for a picture that a model does not see."""

GREY = 127  # of every pixel of a blanked picture
