"""Swap a PyTorch model's normalisation layers for context-aware ones; keep the model."""

from normswap import contexts as contexts
from normswap import functional as functional
from normswap.api import convert as convert
from normswap.api import plan as plan
from normswap.api import summary as summary
from normswap.api import verify as verify
from normswap.calibration import calibrate as calibrate
from normswap.errors import ContextError as ContextError
from normswap.errors import ConversionError as ConversionError
from normswap.errors import MissingContextError as MissingContextError
from normswap.errors import NormswapError as NormswapError
from normswap.errors import UnknownNameError as UnknownNameError
from normswap.errors import VerificationError as VerificationError
from normswap.graph.scope import use_context as use_context
from normswap.methods.acn_layer import AdaptiveContextNorm as AdaptiveContextNorm
from normswap.methods.base import methods as methods
from normswap.methods.base import register_method as register_method
from normswap.methods.cn import ContextNorm as ContextNorm
from normswap.methods.cnx import ContextNormX as ContextNormX
from normswap.methods.instance import ContextInstanceNorm as ContextInstanceNorm
