"""The methods, one file each, found in this folder when a method is first asked for by name."""

from normswap.methods.base import Contexts as Contexts
from normswap.methods.base import Method as Method
from normswap.methods.base import get_method as get_method
from normswap.methods.base import methods as methods
from normswap.methods.base import parse_options as parse_options
from normswap.methods.base import register_method as register_method
