"""torch's recurrent layers as ONNX models of one node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

# From torch's order of the gates to that of ONNX: i f g o -> i o f c, r z n -> z r h.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _reordered(weight: torch.Tensor, kind: str) -> np.ndarray:
    blocks = weight.detach().chunk(len(ORDER[kind]))
    return torch.cat([blocks[i] for i in ORDER[kind]]).numpy()


def model(layer: nn.RNNBase, inputs: tuple[torch.Tensor, ...]) -> bytes:
    """The layer as a serialised model: input ``x`` [T, B, I], outputs ``y`` [T, D, B, H], ``h``, and ``c`` of an LSTM.

    It takes any T and B. The layer is one torch.nn.{RNN, LSTM, GRU} of one layer, float32, with biases and without
    projection.
    """
    from onnx import TensorProto, helper, numpy_helper

    kind = type(layer).__name__
    ends = ["", "_reverse"][: 1 + layer.bidirectional]

    def stacked(*names: str) -> np.ndarray:
        return np.stack(
            [np.concatenate([_reordered(getattr(layer, n + end), kind) for n in names]) for end in ends]
        )

    weights = {
        "w": stacked("weight_ih_l0"),
        "r": stacked("weight_hh_l0"),
        "b": stacked("bias_ih_l0", "bias_hh_l0"),
    }
    options: dict[str, Any] = {"hidden_size": layer.hidden_size}
    options["direction"] = "bidirectional" if layer.bidirectional else "forward"
    if kind == "GRU":
        options["linear_before_reset"] = 1  # the reset gate after the matmul, as in torch
    elif kind == "RNN":
        options["activations"] = [layer.nonlinearity.capitalize()] * len(ends)  # type: ignore[union-attr]
    outputs = ["y", "h", "c"] if kind == "LSTM" else ["y", "h"]
    node = helper.make_node(kind, ["x", *weights], outputs, **options)
    graph = helper.make_graph(
        [node],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", layer.input_size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


def feeds(layer: nn.RNNBase, inputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    return {"x": inputs[0].numpy()}


def outputs(found: Sequence[Any], layer: nn.RNNBase) -> list[torch.Tensor]:
    """What a session returned, in torch's layout: output, then the final states."""
    y, *states = map(torch.from_numpy, found)
    steps, _, batch, _ = y.shape
    return [y.transpose(1, 2).reshape(steps, batch, -1), *states]
