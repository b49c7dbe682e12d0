"""Normalisation layers with a scale and a shift."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.layers.forward import Forward
from lightning_kfc.layers.registry import register_adapter, register_adapter_by_name
from lightning_kfc.layers.scale_shift import ScaleShiftAdapter
from lightning_kfc.utilities.torch_internals import dimensions_of_one_example, saved_moments, saved_tensor_hooks

_Moments = tuple[Tensor, Tensor]


@register_adapter(nn.LayerNorm)
class LayerNormAdapter(ScaleShiftAdapter):
    """Each position is normalised over the last axes."""

    kind: ClassVar[str] = "LayerNorm"
    module: nn.LayerNorm

    def normalised(self, input: Tensor, context: Any) -> Tensor:
        """The module's own, without scale and shift."""
        return F.layer_norm(input, self.module.normalized_shape, eps=self.module.eps)


@register_adapter(nn.RMSNorm)
class RMSNormAdapter(ScaleShiftAdapter):
    """Each position is divided by its root mean square over the last axes; the layer has no shift."""

    kind: ClassVar[str] = "RMSNorm"
    module: nn.RMSNorm

    def normalised(self, input: Tensor, context: Any) -> Tensor:
        """The module's own, without scale."""
        return F.rms_norm(input, self.module.normalized_shape, eps=self.module.eps)


@register_adapter_by_name(
    *(
        f"transformers.models.{package}.modeling_{package}.{norm}"
        for package, norm in {
            "gemma": "GemmaRMSNorm",
            "llama": "LlamaRMSNorm",
            "mistral": "MistralRMSNorm",
            "mixtral": "MixtralRMSNorm",
            "phi3": "Phi3RMSNorm",
            "qwen2": "Qwen2RMSNorm",
            "qwen3": "Qwen3RMSNorm",
            "t5": "T5LayerNorm",
        }.items()
    )
)
class LanguageModelNormAdapter(ScaleShiftAdapter):
    """RMS norms of Hugging Face's language models; a scale that is counted from 1 has the same derivative."""

    kind: ClassVar[str] = "RMSNorm"

    def normalised(self, input: Tensor, context: Any) -> Tensor:
        """The module's own, without scale."""
        eps = getattr(self.module, "variance_epsilon", None) or self.module.eps
        assert isinstance(eps, float)
        return F.rms_norm(input, input.shape[-1:], eps=eps)


@register_adapter(nn.GroupNorm)
class GroupNormAdapter(ScaleShiftAdapter):
    """Each example is normalised over groups of channels and all positions."""

    kind: ClassVar[str] = "GroupNorm"
    units_second: ClassVar[bool] = True
    module: nn.GroupNorm

    def normalised(self, input: Tensor, context: Any) -> Tensor:
        """The module's own, without scale and shift."""
        return F.group_norm(input, self.module.num_groups, eps=self.module.eps)


@register_adapter(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormAdapter(ScaleShiftAdapter):
    """Each example and channel is normalised over its positions, or by running averages in evaluation."""

    kind: ClassVar[str] = "InstanceNorm"
    units_second: ClassVar[bool] = True
    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

    def _rows(self, tensor: Tensor) -> Tensor:
        return super()._rows(self._batched(tensor))

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if tensor.ndim == dimensions_of_one_example(self.module) else tensor

    def context(self, forward: Forward) -> _Moments | None:
        """The running averages if they normalise; else None."""
        own = self.module.training or not self.module.track_running_stats
        return None if own else _running_moments(self.module)

    def normalised(self, input: Tensor, context: _Moments | None) -> Tensor:
        """The module's own, without scale and shift."""
        images = self._batched(input)
        if context is not None:
            mean, variance = (moment.to(input.dtype) for moment in context)
            return F.batch_norm(images, mean, variance, eps=self.module.eps)
        return F.instance_norm(images, eps=self.module.eps)


@register_adapter(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormAdapter(ScaleShiftAdapter):
    """Each channel is normalised over the batch in training, and by running averages in evaluation.

    The derivative is taken at the layer's output, so the layer's own coupling of examples has no effect.
    """

    kind: ClassVar[str] = "BatchNorm"
    units_second: ClassVar[bool] = True
    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

    def context(self, forward: Forward) -> _Moments | None:
        """The normalising moments: the running averages, which a later call may change, or those of the batch.

        The batch's moments are read from autograd, unless saved-tensor hooks are in force, which a read would trigger.
        """
        m = self.module
        own = m.training or (m.running_mean is None and m.running_var is None)
        if not own:
            return _running_moments(m)
        node = getattr(forward.output, "grad_fn", None)
        if saved_tensor_hooks() is not None or node is None:
            return None
        if node.name() not in ("NativeBatchNormBackward0", "CudnnBatchNormBackward0"):
            return None
        return _moments(*saved_moments(node), m.eps)

    def couples_examples(self, context: _Moments | None) -> bool:
        """Whether the batch's moments remain to be computed."""
        return context is None

    def normalised(self, input: Tensor, context: _Moments | None) -> Tensor:
        """The module's own, without scale and shift."""
        if context is None:
            return F.batch_norm(input, None, None, training=True, eps=self.module.eps)
        mean, variance = (moment.to(input.dtype) for moment in context)
        return F.batch_norm(input, mean, variance, eps=self.module.eps)


@register_adapter(nn.SyncBatchNorm)
class SyncBatchNormAdapter(BatchNormAdapter):
    """As batch norm, over the batch of all ranks in training mode."""

    kind: ClassVar[str] = "SyncBatchNorm"
    module: nn.SyncBatchNorm

    def context(self, forward: Forward) -> _Moments | None:
        """The moments over all ranks, read from autograd: computing them again would need communication."""
        node = getattr(forward.output, "grad_fn", None)
        if node is None or node.name() != "SyncBatchNormBackward":
            return super().context(forward)
        _, _, mean, inverse_deviation, _ = node.saved_tensors
        return _moments(mean, inverse_deviation, self.module.eps)


def _running_moments(module: Any) -> _Moments:
    mean, variance = module.running_mean, module.running_var
    assert isinstance(mean, torch.Tensor)
    assert isinstance(variance, torch.Tensor)
    return mean.clone(), variance.clone()


def _moments(mean: Tensor, inverse_deviation: Tensor, eps: float) -> _Moments:
    return mean, inverse_deviation.double().pow(-2).sub(eps).to(inverse_deviation.dtype)
