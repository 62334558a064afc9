"""A policy as one graph, from the noise and what a robot observes to what it shall do.

    noise            (1, horizon, action_dim)         standard normal, whatever the policy's `noise_scale`
    <numbers>        (1, n_obs_steps, *shape)         float32, in the robot's units
    <image>          (1, n_obs_steps, H, W, C)        uint8
    actions          (1, chunk_length, action_dim)    float32, in the robot's units, from the present on

Normalisation is LeRobot's own processor steps, traced. The graph of ONNX holds one step of the solver in a loop, so
that neither its size nor the time to load it grows with the number of steps; torch.export's is unrolled.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
from numpy.typing import NDArray
from torch import Tensor, nn

from fm_policy.evaluation.checkpoint import Checkpoint
from fm_policy.flow.solvers import SCHEMES
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.velocity import VelocityNet

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Policy = Checkpoint[FlowMatchingPolicy]


class Encode(nn.Module):
    """Raw observations to their features o, `(1, obs_dim)`."""

    def __init__(self, checkpoint: Policy) -> None:
        super().__init__()
        self.encoder = checkpoint.policy.active_net.encoder
        self.cameras = list(checkpoint.policy.config.image_features)
        self.normalizer = only_step(checkpoint.preprocessor.steps, NormalizerProcessorStep)

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Pictures become floats in [0, 1] with channels first, as in LeRobot's `preprocess_observation`."""
        pictures = {name: observation[name].movedim(-1, -3).float() / 255 for name in self.cameras}
        normalized = self.normalizer({TransitionKey.OBSERVATION: observation | pictures})
        return self.encoder(normalized[TransitionKey.OBSERVATION])


class Decode(nn.Module):
    """Normalised chunks `(1, horizon, action_dim)` to actions."""

    def __init__(self, checkpoint: Policy) -> None:
        super().__init__()
        self.first = checkpoint.policy.config.n_obs_steps - 1
        self.unnormalizer = only_step(checkpoint.postprocessor.steps, UnnormalizerProcessorStep)

    def forward(self, x: Tensor) -> Tensor:
        """Actions from the present on."""
        return self.unnormalizer({TransitionKey.ACTION: x[:, self.first :]})[TransitionKey.ACTION]


class Whole(nn.Module):
    """All of it, by the policy's own `chunk`."""

    def __init__(self, checkpoint: Policy) -> None:
        super().__init__()
        self.config, self.net = checkpoint.policy.config, checkpoint.policy.active_net
        self.encode, self.decode = Encode(checkpoint), Decode(checkpoint)

    def forward(self, noise: Tensor, observation: dict[str, Tensor]) -> Tensor:
        """See the module."""
        return self.decode(self.net.chunk(self.config, self.config.noise_scale * noise, self.encode(observation)))


class Step(nn.Module):
    """One step of a solver along a net."""

    def __init__(self, net: VelocityNet, solver: str, h: float) -> None:
        super().__init__()
        self.net, self.step, self.h = net, SCHEMES[solver].step, h

    def forward(self, x: Tensor, t: Tensor, o: Tensor) -> Tensor:
        """From x at time t, a scalar, to x at t + h."""
        return self.step(self.net.bind(o), t, self.h, x)  # type: ignore[arg-type]


class Parts(nn.Module):
    """Encoder, steps and decoder side by side: to trace them at once, since each trace costs seconds by itself."""

    def __init__(self, encode: Encode, steps: Iterable[Step], decode: Decode) -> None:
        super().__init__()
        self.encode, self.steps, self.decode = encode, nn.ModuleList(steps), decode

    def forward(
        self, observation: dict[str, Tensor], x: Tensor, t: Tensor, o: Tensor, chunk: Tensor
    ) -> tuple[Tensor, ...]:
        """Features, states after a step, actions."""
        return self.encode(observation), *(step(x, t, o) for step in self.steps), self.decode(chunk)


def only_step[S](steps: Any, kind: type[S]) -> S:
    """The one step of that kind."""
    (found,) = (step for step in steps if isinstance(step, kind))
    return found


def inputs(checkpoint: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise and an observation to trace with."""
    config = checkpoint.policy.config
    observation = {}
    for name, feature in (config.input_features or {}).items():
        image = name in config.image_features
        shape = (*feature.shape[1:], feature.shape[0]) if image else feature.shape
        dtype = torch.uint8 if image else torch.float32
        observation[name] = torch.zeros(1, config.n_obs_steps, *shape, dtype=dtype)
    return torch.zeros(1, *config.noise_shape), observation


def eager(checkpoint: Policy) -> Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]:
    """The policy itself with the signature of its graph, for a `Runner`."""
    whole = Whole(checkpoint).eval()

    def compute(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.inference_mode():
            return whole(tensors.pop("noise"), tensors)[0].numpy()

    return compute


@torch.no_grad()
def write_pt2(checkpoint: Policy, file: Path) -> None:
    """Write the graph as torch.export does; it is called as `module(noise, {name: observation})`."""
    noise, observation = inputs(checkpoint)
    with _quiet():
        torch.export.save(torch.export.export(Whole(checkpoint).eval(), (noise, observation)), file)


class Leg(NamedTuple):
    """A stretch of the way from noise to chunk: equal steps along one net."""

    name: str
    net: VelocityNet
    solver: str
    steps: int
    start: float
    end: float

    @property
    def h(self) -> float:
        """The step's length."""
        return (self.end - self.start) / self.steps

    @property
    def times(self) -> NDArray[np.float32]:
        """Where each step starts, as `flow.solvers.integrate` has it."""
        return np.array([self.start + n * self.h for n in range(self.steps)], dtype=np.float32)


def _legs(checkpoint: Policy) -> list[Leg]:
    config, net = checkpoint.policy.config, checkpoint.policy.active_net
    flow = Leg("flow", net.velocity, config.solver, config.num_solver_steps, 0.0, 1.0)
    if net.head is None:
        return [flow]
    return [flow, Leg("head", net.head, "euler", config.head_steps, 1.0, 1.0 + config.head_span)]


@torch.no_grad()
def write_onnx(checkpoint: Policy, file: Path) -> None:
    """Write the graph as ONNX."""
    import onnx

    legs = _legs(checkpoint)
    model = _assemble(_trace(checkpoint, legs), legs, checkpoint.policy.config.noise_scale)
    onnx.checker.check_model(model)
    onnx.save(model, file)


def _trace(checkpoint: Policy, legs: list[Leg]) -> "ModelProto":
    """The parts as ONNX: `features` of the observations, each leg's next x of x, t and o, `actions` of the `chunk`."""
    noise, observation = inputs(checkpoint)
    steps = [Step(leg.net, leg.solver, leg.h) for leg in legs]
    parts = Parts(Encode(checkpoint), steps, Decode(checkpoint)).eval()
    o = torch.zeros(1, checkpoint.policy.active_net.encoder.output_dim)
    # The clone: one tensor in two places would be traced as one input.
    example = (observation, noise, torch.zeros(()), o, noise.clone())
    names = [*observation, "x", "t", "o", "chunk"]
    outputs = ["features", *(leg.name for leg in legs), "actions"]
    with _quiet():
        traced = torch.export.export(parts, example)
        program = torch.onnx.export(traced, dynamo=True, input_names=names, output_names=outputs, verbose=False)
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the source it came from: a third of the file
    return model


def _assemble(parts: "ModelProto", legs: list[Leg], noise_scale: float) -> "ModelProto":
    """The parts behind one another: encode, scale the noise, loop over each leg's times, decode."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.utils import Extractor

    extract = Extractor(parts).extract_model
    observations = [value.name for value in parts.graph.input if value.name not in ("x", "t", "o", "chunk")]
    encode, decode = extract(observations, ["features"]).graph, extract(["chunk"], ["actions"]).graph
    shape = [dim.dim_value for dim in decode.input[0].type.tensor_type.shape.dim]
    noise = helper.make_tensor_value_info("noise", TensorProto.FLOAT, shape)
    nodes = [*encode.node, helper.make_node("Identity", ["features"], ["o"])]
    nodes.append(helper.make_node("Mul", [noise.name, "noise_scale"], ["x0"]))
    state = "x0"
    for leg in legs:
        body = extract(["x", "t", "o"], [leg.name]).graph
        nodes.append(_loop(body, [state, f"{leg.name}.times"], f"{leg.name}.end"))
        state = f"{leg.name}.end"
    nodes += [helper.make_node("Identity", [state], ["chunk"]), *decode.node]
    constants = {"noise_scale": np.float32(noise_scale)} | {f"{leg.name}.times": leg.times for leg in legs}
    weights = [*parts.graph.initializer]
    weights += [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "policy", [*encode.input, noise], decode.output, weights)
    return helper.make_model(graph, opset_imports=parts.opset_import, ir_version=parts.ir_version)


def _loop(body: "GraphProto", values: list[str], end: str) -> "NodeProto":
    """ONNX's Scan: x from the first of the values through the body, once for each t in the second, to `end`.

    The features o and the weights are those of the graph around it.
    """
    from onnx import helper

    del body.initializer[:]
    x, t, _ = body.input
    scan = helper.make_graph(body.node, end, [x, t], body.output)
    return helper.make_node("Scan", values, [end], name=end, body=scan, num_scan_inputs=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporters, which warn of their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
