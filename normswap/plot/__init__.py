"""Pictures of converted models and of runs, by matplotlib, which is imported when one is drawn."""

from normswap.plot.curves import curves as curves
from normswap.plot.densities import Components as Components
from normswap.plot.densities import densities as densities
from normswap.plot.divergence import divergence as divergence
from normswap.plot.firing import Firings as Firings
from normswap.plot.firing import firing as firing
from normswap.plot.firing import record_firing as record_firing
