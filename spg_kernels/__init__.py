"""SPG: soft-masking of parameter-level gradient flow for continual learning, as fused kernels behind a drop-in optimizer."""

from .importance import Importance
from .measuring import SharedTrunkLosses, cross_head_losses
from .ops import BackendError, NonFiniteGradientError, SPGError
from .optimizer import SPGOptimizer
from .functional import (  # after the module of that name: `importance` is the function here
    accumulate_importance_,
    importance,
    masked_adamw_,
    masked_sgd_,
    soft_mask_,
    update_mask_,
)

__version__ = "0.1.0"

__all__ = ["BackendError", "Importance", "NonFiniteGradientError", "SPGError", "SPGOptimizer", "SharedTrunkLosses",
           "accumulate_importance_", "cross_head_losses", "importance", "masked_adamw_", "masked_sgd_", "soft_mask_",
           "update_mask_"]
