"""Tracing one container: a graph that stands for its forward, or why none does.

1. The forward runs once, on symbols in place of tensors (`symbol`). What it asks of a symbol, and
   each call of a submodule or of torch, is written down as a node, not done (`tracer`).
2. Meanwhile calls of modules, and reads of their attributes, go to the tracer (`patches`). Other
   functions run, as methods do.
3. The bytecode of each function is read before it runs (`watch`, by way of `graph.code`). An
   instruction that may do or find something else in another run ends the trace first (`whitelist`,
   `failure`).
4. What the forward read of the module and around it is kept, lists and dicts as copies, and
   compared before each run of the graph (`reads`); where it differs, the forward is traced anew.
5. It may not change lists that it was given, nor hand its own to others (`list_effects`).
6. The caller adds the context to calls that take it, compiles the graph and keeps it (`prepare`).
"""

from normswap.graph.tracing.failure import TraceFailure as TraceFailure
from normswap.graph.tracing.reads import NO_GUARDS as NO_GUARDS
from normswap.graph.tracing.reads import Guards as Guards
from normswap.graph.tracing.reads import flipped as flipped
from normswap.graph.tracing.reads import walk as walk
from normswap.graph.tracing.signature import ForwardFunctions as ForwardFunctions
from normswap.graph.tracing.signature import any_parameters as any_parameters
from normswap.graph.tracing.signature import free_argument as free_argument
from normswap.graph.tracing.signature import parameters_of as parameters_of
from normswap.graph.tracing.signature import write_forward as write_forward
from normswap.graph.tracing.trace import Traced as Traced
from normswap.graph.tracing.trace import TraceSession as TraceSession
from normswap.graph.tracing.trace import tracing as tracing
from normswap.graph.tracing.tracer import structure_of as structure_of
from normswap.graph.tracing.value_kinds import Kind as Kind
from normswap.graph.tracing.value_kinds import describe as describe
from normswap.graph.tracing.value_kinds import symbolic_parts as symbolic_parts
