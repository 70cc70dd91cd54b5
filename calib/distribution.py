"""What a calibrator may ask about a tensor, and the two things that answer.

`Samples` holds raw values and answers exactly (weights). `Histogram` holds bfloat16 counts and
answers from at most 65,536 bins, however many values were counted (activations).
"""

from __future__ import annotations

from calib.histogram import Histogram
from calib.protocol import HISTOGRAM_BITS, Distribution, Seeking, Tail, seeking, sweep
from calib.ranked import Floats
from calib.samples import Samples

__all__ = [
    "HISTOGRAM_BITS",
    "Distribution",
    "Floats",
    "Histogram",
    "Samples",
    "Seeking",
    "Tail",
    "seeking",
    "sweep",
]
