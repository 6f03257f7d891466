"""Images from any source to the network input, and back to the original pixels.

``read`` decodes an image file, ``video`` a frame, ``resize`` applies a backbone's crop, pad or budget rule,
``transform`` records the mapping, ``load`` combines them; ``masks`` and ``given`` read masks and known conditions.
``tensors`` wraps tensors in the same interface.
"""

from geoaccel.images.given import load_conditions
from geoaccel.images.load import ImageBatch, check_file, load_images
from geoaccel.images.masks import find_masks, load_masks
from geoaccel.images.read import IMAGE_SUFFIXES
from geoaccel.images.sources import is_photograph, natural_key
from geoaccel.images.transform import ImageTransform
from geoaccel.images.video import VIDEO_SUFFIXES

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "ImageBatch",
    "ImageTransform",
    "check_file",
    "find_masks",
    "is_photograph",
    "load_conditions",
    "load_images",
    "load_masks",
    "natural_key",
]
