"""The layer of CN: batch statistics and an affine for each context."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.functional.affine import Centred, centre_norm, pool_norm
from normswap.functional.backend import is_eager, is_scripted
from normswap.functional.label_rows import one_label
from normswap.functional.moments import (
    Moments,
    as_dtype,
    combine_moments,
    compute_dtype,
    context_posterior,
    instance_moments,
)
from normswap.functional.norm_contexts import norm_contexts
from normswap.functional.recomputation import in_backward, may_run_again
from normswap.functional.segments import Counts, count, segments
from normswap.functional.tables import apply_by_label
from normswap.methods.cn_tables import ContextTables
from normswap.methods.running import RUNNING
from normswap.util.distributed import sum_over, sum_over_ddp


class ContextNorm(ContextTables):
    """Context normalization (CN).

    ``y = (gamma_c * (x - mu_c) / sqrt(var_c + eps) + beta_c) / sqrt(lambda_c)`` for a sample of
    context c. In training, mu_c and var_c (biased) are over the samples of c in the batch and all
    positions; in eval, the running statistics of c. Running statistics move as BatchNorm's do
    (unbiased variance), only for contexts in the batch. A context with a single value per channel
    is normalised with its running statistics and does not update them; so are samples labelled -1,
    with those the policy `unknown` names.

    Args:
        num_features: C.
        num_contexts: K.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics, in [0, 1]; None keeps the
            cumulative average.
        priors: lambda, (K,), positive, sums to one; uniform by default.
        unknown: policy for samples without a label; see `ContextLayer`.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        synced: in training, take mu_c and var_c over the batches of all processes, as
            SyncBatchNorm does, or of those in the group that the attribute `process_group` names.
            Processes may have batches of different sizes, even empty, and lack contexts; all take
            part in every training forward and backward. Without it, DistributedDataParallel
            leaves the normalisation to each process, and the running statistics take the samples
            of all.
        shrink: a, in samples: in training, mu_c and var_c are drawn towards those of the whole
            batch, ``m_c' = (n_c m_c + a m) / (n_c + a)`` for n_c samples of c, and the mean square
            alike; running statistics take the drawn values. For few samples a context; infinity
            leaves contexts nothing but their affine.
        affine: "context", gamma and beta for each; or "shared", one (C,) for all, without lambda.

    Shape:
        x: (N, C, *); context: (N,). Parameters weight, bias: (K, C), or (C,) shared; buffers
        running_mean, running_var: (K, C), num_batches_tracked, priors: (K,).

    Source: Faye et al., arXiv 2403.16798, CN.
    Differs from source: channels are dimension 1; parameters exist before the first forward;
    eval uses running statistics; labels out of range are an error instead of passing through.
    Differs from torch's norms: what gradient checkpointing computes again in backward moves the
    running statistics no second time.
    """

    kernels = "context_norm"
    stats_frozen = False  # `normswap.freeze` sets it: use the running statistics, leave them
    read = ("weight", "bias", "priors", *RUNNING)
    most_weighed = 64
    _first_run: Moments | None = None

    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class.

        Labels in training, unless frozen, take the moments of the batch (`_train_step`); all else
        takes the running statistics: the map of each label, the policy's where there is none.
        """
        if not (self.training and (self.synced or self.shrink)):
            if (found := self.find_triton(x, unlabelled)) is not None:
                triton, tensors = found
                return self._normalize_by_triton(triton, x, labels, unlabelled, *tensors)
        dtype = compute_dtype(x)
        running = Moments(as_dtype(self.running_mean, dtype), as_dtype(self.running_var, dtype))
        batch = None if self.frozen or self.stats_frozen or not self.training else labels
        if batch is not None and not unlabelled and self._has_every_context(x, batch):
            return self._train_step(x, batch, unlabelled, running)
        if self.training or torch.is_grad_enabled() or is_scripted():
            # Updates are in place, by this forward or a later one; these values are still needed.
            running = Moments(running.mean.clone(), running.var.clone())
            running = self._at_first_run(running)
        if batch is not None:
            return self._train_step(x, batch, unlabelled, running)
        affine = self.effective_affine(dtype)
        table = partial(centre_norm, running, *affine, self.eps)
        unknown = partial(self._unknown, partial(instance_moments, x), running, *affine)
        return apply_by_label(x, table, labels, unlabelled, unknown)

    def _normalize_by_triton(
        self, triton: Any, x: Tensor, labels: Tensor | None, unlabelled: bool,
        weight: Tensor, bias: Tensor, priors: Tensor, mean: Tensor, var: Tensor, batches: Tensor,
    ) -> Tensor:  # fmt: skip
        batched = labels is not None and self.training and not (self.frozen or self.stats_frozen)
        buffers = running = Moments(mean, var)
        again = together = False
        if self.training:
            again, together = in_backward(), sum_over_ddp() is not None
            if again or may_run_again():
                running = self._at_first_run(Moments(*(t.clone() for t in buffers)))
        weighs = self.weighs(unlabelled)
        if self.shared_affine:
            factor = priors.sqrt().unsqueeze(1)
            weight, bias = weight * factor, bias * factor
        moves = batched and not (self.keeps_stats() or together)
        rates = (float(self.eps), None if self.momentum is None else float(self.momentum))
        norm = triton.Norm(
            triton.KERNELS,
            (weight, bias),
            priors,
            None if weighs else self.pooled_contexts(unlabelled),
            weighs,
            batched,
            (*running, batches),
            (*buffers, batches) if moves else (),
            rates,
            partial(triton.note_moments, self._update) if batched and together else None,
        )
        labels = None if labels is None else one_label(labels)
        y: Tensor = triton.normalize(x, labels, norm)
        return y

    def _at_first_run(self, running: Moments) -> Moments:
        """Return what the running statistics were when this forward first ran.

        Gradient checkpointing runs it again, after its update; samples without a label have to
        meet the same statistics then. Of several forwards before one backward, the last counts.
        In eval mode nothing moves them.
        """
        if not self.training:
            return running
        if torch.compiler.is_compiling():
            # The compiler computes again in backward what is cheap, from the buffers as updated
            # (pytorch/pytorch#197039), but keeps the result of a flip.
            return Moments(*(t.flip(0).flip(0) for t in running))
        if in_backward():
            return self._first_run or running
        self._first_run = running
        return running

    def _has_every_context(self, x: Tensor, labels: Tensor) -> bool:
        """Return whether the host knows that no running statistics stand in for a context's."""
        if labels.device.type != "cpu" or not is_eager():
            return False
        count, size = self.num_contexts, x.shape[2:].numel()
        return segments(labels, count, count, size, compute_dtype(x)).counts.every

    def _train_step(self, x: Tensor, labels: Tensor, unlabelled: bool, running: Moments) -> Tensor:
        """Normalise with each context's moments in this batch, and update the running ones."""
        given, dtype = running, running.mean.dtype
        override: Callable[..., Centred] | None = None
        weight, bias = (t.to(dtype).expand_as(running.mean) for t in (self.weight, self.bias))
        factor = self.affine_factor(dtype)
        if unlabelled:
            # One more context, whose moments are given.
            row = self._unknown_row(running, weight * factor, bias * factor)
            given = Moments(*(torch.cat(pair) for pair in zip(running, row[0], strict=True)))
            weight, bias = torch.cat((weight, row[1])), torch.cat((bias, row[2]))
            factor = torch.cat((factor, torch.ones_like(factor[:1])))
            if self.weighs(unlabelled):

                def override(table: Centred, instances: Moments, *affine: Tensor) -> Centred:
                    known = (t[: self.num_contexts] for t in affine)
                    other = self._unknown(lambda: instances, running, *known)
                    return table.where(labels >= 0, other)

        reduce = sum_over(self.process_group) if self.synced else None
        settings = (self.num_contexts, self.eps, self._update, reduce, override, self.shrink)
        return norm_contexts(x, labels, weight, bias, factor, given, *settings)

    @torch.no_grad()
    def _update(self, used: Moments, counts: Counts) -> None:
        """Move the running statistics; where a context had no moments, `used` holds them."""
        if self.keeps_stats():
            return
        reduce = None if self.synced else sum_over_ddp()
        if reduce is not None:
            # The wrapper gives every process the buffers of the first one, before each forward:
            # contexts that only others have would never be updated.
            own = torch.where(counts.usable, counts.values, 0)
            values, found = combine_moments(own, used, reduce)
            running = Moments(*(t.to(values) for t in (self.running_mean, self.running_var)))
            counts = count(values)
            used = found.where(counts.usable, running)
        self.num_batches_tracked.add_(1 if counts.every else counts.usable.squeeze(1))
        rate = self.running_rate(used.mean.dtype)
        if not counts.every:
            # Contexts without moments stay: their rate is 0, and the factor finite.
            rate = counts.usable.to(used.mean.dtype) * rate
        self.move_running(used.mean, used.var * counts.unbias, rate)

    def _unknown(
        self, instances: Callable[[], Moments], running: Moments, weight: Tensor, bias: Tensor
    ) -> Centred:
        """Return the map of samples without a label: one row, or one a sample ("posterior")."""
        if self.weighs(True):
            weights = context_posterior(instances(), running, self.mixing(weight.dtype), self.eps)
            return centre_norm(running, weight, bias, self.eps).mix(weights)
        return centre_norm(*self._unknown_row(running, weight, bias), self.eps)

    def _unknown_row(
        self, running: Moments, weight: Tensor, bias: Tensor
    ) -> tuple[Moments, Tensor, Tensor]:
        """Return moments, gamma and beta of the one row, (1, C), that unknown labels take."""
        row = self.row_unlabelled(*running, weight, bias)
        if row is not None:
            return Moments(*row[:2]), row[2], row[3]
        mixing = self.mixing(weight.dtype).unsqueeze(1)
        weight, bias = ((mixing * t).sum(0, keepdim=True) for t in (weight, bias))
        pooled, bias = pool_norm(running, mixing, weight, bias, self.eps)
        return pooled, weight, bias
