"""One image: decoding within limits, colour profiles, crops, borders, line drawings, perceptual hashes."""

from typing import Literal

LineMethod = Literal["canny", "xdog", "contour"]
"""Methods of line extraction (line_drawings.py). Here, so that options name them and import nothing else."""
