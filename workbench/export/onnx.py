"""The network of a run as ONNX, int8 ONNX, ONNX with preprocessing, and torch.export program."""

import io
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.export.archive import FORMATS, ExportError
from workbench.export.metadata import Preprocess

OPSET = 20
QUANTISED_OPS = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger")

Runner = Callable[[torch.Tensor], np.ndarray]  # input of a network -> logits (n, classes)
Axes = dict[int, torch.export.Dim]  # dynamic axes of an input
BATCH: Axes = {0: torch.export.Dim("batch")}


class Network(nn.Module):
    """A model that returns (softmax, logits), both float32 (n, classes).

    If `preprocess.normalised_inside`, the input is uint8 and is normalised here.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess):
        super().__init__()
        self.model, self.preprocess, self.size = model, preprocess, preprocess.size
        self.uint8_input = preprocess.normalised_inside
        for name in ("mean", "std"):
            value = torch.tensor(getattr(preprocess, name)).mul(255).reshape(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.uint8_input:
            data = (data.float() - self.mean) / self.std
        logits = self.model(data)
        return logits.softmax(1), logits

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """The input of this network for uint8 images (n, 3, size, size)."""
        return images if self.uint8_input else (images.float() - self.mean) / self.std

    def noise(self, count: int) -> torch.Tensor:
        """uint8 images of noise, the same in every call."""
        shape = (count, 3, self.size, self.size)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return torch.from_numpy(images)


class NetworkWithPreprocessing(nn.Module):
    """A network for decoded images, uint8 (n, 3, height, width) of any one size.

    Resizes and crops as Pillow does, to one grey level. Bilinear and bicubic only.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        preprocess = self.network.preprocess
        size, resize = preprocess.size, preprocess.resize
        height, width = data.shape[-2:]
        short = torch.sym_min(height, width)
        shape = (resize * height // short, resize * width // short)
        images = data.float()
        for step in ((height, shape[1]), shape):  # Pillow resizes rows first and rounds
            images = nn.functional.interpolate(
                images, step, mode=preprocess.interpolation, antialias=True
            )
            images = images.round().clamp(0, 255)
        for axis, side in zip((-2, -1), shape, strict=True):
            start = (side - size) // 2
            start += (side - size) % 2 * (start % 2)  # half to even, as in CenterCrop
            images = images.narrow(axis, start, size)
        images = images.reshape(-1, 3, size, size)  # a static shape for the exporter
        return self.network(images if self.network.uint8_input else self.network.to_input(images))


def to_onnx(network: Network) -> bytes:
    """The network as ONNX with weights, any batch size: `data` -> `score` and `logits`.

    Uses torch's dynamo exporter. Raises ExportError.
    """
    return _to_onnx(network, network.to_input(network.noise(2)), BATCH)


def to_onnx_with_preprocessing(network: Network) -> bytes:
    """NetworkWithPreprocessing as ONNX, any batch size, height and width. Raises ExportError."""
    resize, interpolation = network.preprocess.resize, network.preprocess.interpolation
    if interpolation not in ("bilinear", "bicubic"):
        raise ExportError(f"preprocessing with {interpolation} cannot be exported to ONNX")
    images = torch.zeros(2, 3, resize + 8, resize + 24, dtype=torch.uint8)
    height, width = (torch.export.Dim(name, min=4, max=2**15) for name in ("height", "width"))
    whole = NetworkWithPreprocessing(network).eval()
    return _to_onnx(whole, images, {**BATCH, 2: height, 3: width})


def to_torch_export(network: Network) -> bytes:
    """The network as a file for torch.export.load, any batch size."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _trace(network, network.to_input(network.noise(2)), BATCH)
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _trace(network: nn.Module, data: torch.Tensor, axes: Axes) -> torch.export.ExportedProgram:
    program = torch.export.export(network, (data,), dynamic_shapes=(axes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would ship the paths of this machine
    return program


def _to_onnx(network: nn.Module, data: torch.Tensor, axes: Axes) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            program = torch.onnx.export(
                _trace(network, data, axes),
                dynamo=True,
                input_names=["data"],
                output_names=["score", "logits"],
                dynamic_shapes=({axis: dim.__name__ for axis, dim in axes.items()},),
                opset_version=OPSET,
                verbose=False,
            )
            return program.model_proto.SerializeToString()
    except Exception as error:  # the exporter raises many types
        reason = str(error).strip().split("\n")[0]
        raise ExportError(f"torch cannot export this model to ONNX: {reason}") from None


def to_int8(content: bytes, inputs: Iterable[np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """An ONNX network quantised to int8, and its number of integer nodes by operator.

    onnxruntime's static quantisation with ranges of `inputs`; weights per channel, -64 to 64.
    x86-64 without VNNI adds two products in 16 bits: 2 * 255 * 64 = 32640 fits, 2 * 255 * 127
    = 64770 would saturate at 32767, so these sums are the same on every processor. Raises
    ExportError if no node was quantised.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        remaining = iter(inputs)

        def get_next(self):
            return next(({"data": data} for data in self.remaining), None)

    with tempfile.TemporaryDirectory() as folder:
        float32, prepared, int8, optimised = (f"{folder}/{name}.onnx" for name in "abcd")
        Path(float32).write_bytes(content)
        quant_pre_process(float32, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            int8,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "MaxPool", "Relu", "Clip"],
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        content = Path(int8).read_bytes()
        session(content, optimised=optimised)
        nodes = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    found = {name: nodes[name] for name in QUANTISED_OPS if nodes[name]}
    if not found:
        raise ExportError(f"no node computes in int8 after quantisation: {dict(nodes)}")
    return content, found


def session(content: bytes, threads: int = 0, optimised: str = "") -> Any:
    """An onnxruntime.InferenceSession on the CPU; by default with as many threads as torch.

    A network with external data is refused, because it is given as bytes. The graph after
    optimisation is written to the file `optimised`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = optimised
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def onnx_runner(content: bytes) -> Runner:
    """The logits of an ONNX network, by onnxruntime."""
    network = session(content)
    return lambda data: network.run(["logits"], {"data": data.numpy()})[0]


def runners(files: Mapping[str, bytes], network: Network | None = None) -> dict[str, Runner]:
    """Every format of a network by name; `network` in PyTorch is the first."""
    found: dict[str, Runner] = {}
    if network is not None:
        found["torch"] = torch.no_grad()(lambda data: network(data)[1].numpy())
    for name in ("onnx", "int8"):
        if FORMATS[name] in files:
            found[name] = onnx_runner(files[FORMATS[name]])
    if FORMATS["torch_export"] in files:
        program = torch.export.load(io.BytesIO(files[FORMATS["torch_export"]])).module()
        found["torch_export"] = lambda data: program(data)[1].detach().numpy()
    return found
