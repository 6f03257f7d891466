"""Token merging for 3D multimodal LLMs: choice of the visual tokens to keep, and merging of the others.

Nothing here needs transformers, which the hosts need (extra ``mllm``).
"""

from geoaccel.mllm.baselines import BASELINES
from geoaccel.mllm.geometry import GeometryTokens, geometry_features
from geoaccel.mllm.merge3d import Merge3DConfig, plan_merge
from geoaccel.mllm.saliency import SaliencyProbe
from geoaccel.mllm.token_plan import TokenPlan

__all__ = [
    "BASELINES",
    "GeometryTokens",
    "Merge3DConfig",
    "SaliencyProbe",
    "TokenPlan",
    "geometry_features",
    "plan_merge",
]
