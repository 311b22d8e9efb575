"""Dilated Neighborhood Attention Transformers with relative positional bias, as backbones and classifiers."""

from .attention import NeighborhoodAttention2D
from .backbone import NAT, DiNAT, DiNAT_s
from .classifier import create_classifier, list_models
from .ops import neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked

__version__ = "0.1.0"
__all__ = [
    "NAT",
    "DiNAT",
    "DiNAT_s",
    "NeighborhoodAttention2D",
    "create_classifier",
    "list_models",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_qkvpacked",
]
