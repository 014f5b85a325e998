"""The methods, one file each; importing the package registers them."""

from normswap.methods import acn as acn
from normswap.methods import cn as cn
from normswap.methods import cnsn as cnsn
from normswap.methods import cnx as cnx
from normswap.methods import crossnorm as crossnorm
from normswap.methods import selfnorm as selfnorm
from normswap.methods.base import Contexts as Contexts
from normswap.methods.base import Method as Method
from normswap.methods.base import get_method as get_method
from normswap.methods.base import methods as methods
from normswap.methods.base import parse_options as parse_options
from normswap.methods.base import register_method as register_method
