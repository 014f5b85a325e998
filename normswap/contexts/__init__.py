"""Contexts: what is known of them before training."""

from normswap.contexts.priors import check_priors as check_priors
from normswap.contexts.priors import count_priors as count_priors
from normswap.contexts.priors import uniform_priors as uniform_priors
