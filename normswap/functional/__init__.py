"""Functions of tensors that the methods share."""

from normswap.functional.affine import Affine as Affine
from normswap.functional.affine import Centred as Centred
from normswap.functional.affine import centre_norm as centre_norm
from normswap.functional.affine import fold_norm as fold_norm
from normswap.functional.labels import Context as Context
from normswap.functional.labels import resolve_labels as resolve_labels
from normswap.functional.mixture import Mixture as Mixture
from normswap.functional.mixture import norm_positions as norm_positions
from normswap.functional.mixture import responsibilities as responsibilities
from normswap.functional.mixture_fused import norm_elements as norm_elements
from normswap.functional.mixture_instances import norm_instances as norm_instances
from normswap.functional.moments import Moments as Moments
from normswap.functional.moments import context_moments as context_moments
from normswap.functional.moments import context_posterior as context_posterior
from normswap.functional.moments import gaussian_divergence as gaussian_divergence
from normswap.functional.moments import instance_moments as instance_moments
from normswap.functional.moments import pool_moments as pool_moments
from normswap.functional.stat_maps import stat_affine as stat_affine
from normswap.functional.tables import apply_affine as apply_affine
from normswap.functional.tables import apply_centred as apply_centred
