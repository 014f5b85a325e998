"""Contexts: where they come from, and what is known of them before training."""

from normswap.contexts.assigner import Assigner as Assigner
from normswap.contexts.assigner import load as load
from normswap.contexts.columns import from_columns as from_columns
from normswap.contexts.drop import drop_labels as drop_labels
from normswap.contexts.fit_clusters import gaussian_mixture as gaussian_mixture
from normswap.contexts.fit_clusters import kmeans as kmeans
from normswap.contexts.folders import from_folders as from_folders
from normswap.contexts.folders import list_images as list_images
from normswap.contexts.priors import check_priors as check_priors
from normswap.contexts.priors import count_priors as count_priors
from normswap.contexts.priors import uniform_priors as uniform_priors
from normswap.contexts.superclasses import from_superclasses as from_superclasses
from normswap.contexts.tally import ContextReport as ContextReport
