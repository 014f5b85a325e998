"""The methods, one file each, found in this folder when a method is first asked for by name."""

from normswap.methods.base import Contexts as Contexts
from normswap.methods.base import Method as Method
from normswap.methods.registry import get_method as get_method
from normswap.methods.registry import methods as methods
from normswap.methods.registry import parse_options as parse_options
from normswap.methods.registry import register_method as register_method
