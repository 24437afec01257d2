"""transformers' side of loading by `StreamedModel`: a quantizer that is handed each tensor, and hands it on."""

from __future__ import annotations

import functools
from typing import Any, Final

from engine.checkpoints.streamed.layers import StreamedModel

__all__ = ["as_quantizer"]

_NAME: Final = "verbatim_streamed"
"""What transformers knows our way to load by: a value of `quant_method`."""


def as_quantizer(streamed: StreamedModel) -> tuple[Any, Any]:
    """Return the `quantization_config` that hands a model's weights to `streamed`, and what tells which tensors of the
    files it will hand on unread."""
    config = _classes()(streamed)
    return config, lambda name: config.stays(name)


@functools.cache
def _classes() -> Any:
    """Teach transformers our way to load, once in a process."""
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_NAME)
    class StreamedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, streamed: StreamedModel) -> None:
            self.quant_method, self.streamed = _NAME, streamed
            self.stays: Any = lambda name: False

        def __deepcopy__(self, memo: Any) -> StreamedConfig:
            return self

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": _NAME}

    class Take(ConversionOps):  # type: ignore[misc]
        def __init__(self, streamed: StreamedModel) -> None:
            self.streamed = streamed

        def convert(
            self, input_dict: dict[str, Any], *, model: Any, missing_keys: set[str] | None = None, **_: Any
        ) -> dict[str, Any]:
            rest: dict[str, Any] = {}
            for name, values in input_dict.items():
                value = values[0] if isinstance(values, list) else values
                if not self.streamed.takes(name):
                    rest[name] = value
                    continue
                try:
                    value = self.streamed.take(model, name, value)
                except Exception as error:
                    self.streamed.error = self.streamed.error or error
                    raise
                if value is not None:
                    rest[name] = value
                elif missing_keys is not None:
                    missing_keys.discard(name)
            return rest

    @register_quantizer(_NAME)
    class StreamedQuantizer(HfQuantizer):  # type: ignore[misc]
        is_trainable = False

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.pre_quantized = False  # then transformers reads one tensor after the other, when it is wanted
            self.streamed: StreamedModel = quantization_config.streamed

        def is_serializable(self) -> bool:
            return False

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return self.streamed.takes(param_name)

        def get_quantize_ops(self) -> Any:
            return Take(self.streamed)

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            self.streamed.plan(model)

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            renamings = [one for one in weight_conversions if isinstance(one, WeightRenaming)]
            converters = [one for one in weight_conversions if isinstance(one, WeightConverter)]
            known = model.state_dict()

            def stays(name: str) -> bool:
                prefix = model.base_model_prefix
                renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
                if renamed not in known and name in known:  # as transformers does
                    renamed, pattern = rename_source_key(name, [], [], prefix, known)
                return pattern is None and self.streamed.takes(renamed)

            self.quantization_config.stays = stays
            return weight_conversions

        def postprocess_model(self, model: Any, **_: Any) -> None:
            self.remove_quantization_config(model)

    return StreamedConfig
