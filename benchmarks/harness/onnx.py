"""onnxruntime's operators as calls; its threads wait asleep, or they would take the cores from the others."""

from __future__ import annotations

from collections.abc import Callable

import torch


def softmax_top_k(logits: torch.Tensor, top_k: int) -> Callable[[], torch.Tensor]:
    """Softmax, then TopK: the weights."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(logits.shape))
    weights = helper.make_tensor_value_info("weights", TensorProto.FLOAT, [logits.shape[0], top_k])
    count = helper.make_tensor("k", TensorProto.INT64, [1], np.array([top_k]))
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"], axis=-1),
        helper.make_node("TopK", ["p", "k"], ["weights", "indices"], axis=-1),
    ]
    model = helper.make_model(helper.make_graph(nodes, "gate", [rows], [weights], [count]))
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    numbers = logits.numpy()
    return lambda: torch.from_numpy(session.run(["weights"], {"x": numbers})[0])
