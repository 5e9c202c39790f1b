"""torch's attention as an ONNX model of one node, ``Attention`` of opset 23."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from seqkern.bench.attention_models import CAP, ByTorch

OPSET, IR = 23, 10


def _mask(module: ByTorch, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    a = module.asked
    return inputs[3][None] if len(inputs) > 3 else a.mask if a.mask is not None else a.dense


def feeds(module: ByTorch, inputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    """Query, key, value and, where the option is one or is written out as one, a mask or what is added."""
    given = [*inputs[:3], _mask(module, inputs)]
    return {name: x.numpy() for name, x in zip("qkvm", given, strict=True) if x is not None}


def model(module: ByTorch, inputs: tuple[torch.Tensor, ...]) -> bytes:
    """The call as a serialised model: inputs as in `feeds`, output ``y`` [B, H, L, D]. float32, without dropout."""
    from onnx import TensorProto, helper

    given, asked = feeds(module, inputs), module.asked
    options: dict[str, Any] = {"is_causal": int(asked.causal and "m" not in given)}
    if asked.option == "softcap":
        options["softcap"] = CAP
    node = helper.make_node("Attention", list(given), ["y"], **options)
    kinds = {np.dtype(bool): TensorProto.BOOL, np.dtype(np.float32): TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kinds[x.dtype], None) for name, x in given.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return made.SerializeToString()


def outputs(found: Sequence[Any], module: ByTorch) -> list[torch.Tensor]:
    return [torch.from_numpy(found[0])]
