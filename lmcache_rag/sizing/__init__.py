"""What lmcache-rag would bring on a machine that is not at hand: bytes, seconds and money by formulas.

`docs/sizing.md` derives them and compares them with what was measured.
"""

from lmcache_rag.sizing.estimate import Corpus, Estimate, Links, Load, estimate
from lmcache_rag.sizing.hardware import GPUS, Hardware, gpus
from lmcache_rag.sizing.measured import measured_hardware
from lmcache_rag.sizing.shapes import MODELS, ModelShape, model_shape

__all__ = [
    "GPUS",
    "MODELS",
    "Corpus",
    "Estimate",
    "Hardware",
    "Links",
    "Load",
    "ModelShape",
    "estimate",
    "gpus",
    "measured_hardware",
    "model_shape",
]
