"""A policy as one graph, from the noise and what a robot observes to what it shall do.

    noise            (1, horizon, action_dim)
    <numbers>        (1, n_obs_steps, *shape)         float32, in the robot's units
    <image>          (1, n_obs_steps, H, W, C)        uint8
    actions          (1, chunk_length, action_dim)    float32, in the robot's units, from the present on

Normalisation is LeRobot's own processor steps, traced. The graph of ONNX holds one step of the solver in a loop, so
that neither its size nor the time to load it grows with the number of steps; torch.export's is unrolled.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from onnx import ModelProto

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
        return self.decode(self.net.chunk(self.config, noise, self.encode(observation)))


class Step(nn.Module):
    """One step of a solver along a net."""

    def __init__(self, net: VelocityNet, solver: str, h: float) -> None:
        super().__init__()
        self.net, self.step, self.h = net, SCHEMES[solver].step, h

    def forward(self, x: Tensor, t: Tensor, o: Tensor) -> Tensor:
        """From x at time t, a scalar, to x at t + h."""
        return self.step(self.net.bind(o), t, self.h, x)  # type: ignore[arg-type]


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


@torch.no_grad()
def write_onnx(checkpoint: Policy, file: Path) -> None:
    """Write the graph as ONNX."""
    import onnx

    config, net = checkpoint.policy.config, checkpoint.policy.active_net
    x, observation = inputs(checkpoint)
    o = torch.zeros(1, net.encoder.output_dim)
    flow = ("flow", net.velocity, config.solver, config.num_solver_steps, 0.0, 1.0)
    head = ("head", net.head, "euler", config.head_steps, 1.0, 1.0 + config.head_span)
    models = [_part("encode", Encode(checkpoint), (observation,), list(observation), "o")]
    state = "noise"
    for name, field, solver, count, start, end in (flow, head):
        if field is not None:
            h = (end - start) / count
            step = _part(name, Step(field, solver, h), (x, torch.zeros(()), o), ["x", "t", "o"], "next")
            models.append(_loop(step, [start + n * h for n in range(count)], state, name))
            state = name
    models.append(_part("decode", Decode(checkpoint), (x,), [state], "actions"))
    model = _join(models)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _part(name: str, module: nn.Module, example: tuple[Any, ...], names: list[str], output: str) -> "ModelProto":
    """A module as ONNX, each of its inner names beginning with `name`."""
    from onnx.compose import add_prefix

    with _quiet():
        traced = torch.export.export(module.eval(), example)
        program = torch.onnx.export(traced, dynamo=True, input_names=names, output_names=[output], verbose=False)
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the source it came from: a third of the file
    return add_prefix(model, f"{name}.", rename_inputs=False, rename_outputs=False)


def _loop(step: "ModelProto", times: list[float], start: str, end: str) -> "ModelProto":
    """A step from x at t under o, once for each time: ONNX's Scan from `start` to `end`, which sees o from outside."""
    from onnx import helper, numpy_helper

    body = step.graph
    x, t, o = body.input
    shape = [dim.dim_value for dim in x.type.tensor_type.shape.dim]
    ends = [helper.make_tensor_value_info(name, x.type.tensor_type.elem_type, shape) for name in (start, end)]
    grid = numpy_helper.from_array(np.array(times, dtype=np.float32), f"{end}.times")
    del body.input[:]
    body.input.extend([x, t])
    scan = helper.make_node("Scan", [start, grid.name], [end], name=end, body=body, num_scan_inputs=1)
    graph = helper.make_graph([scan], end, [ends[0], o], [ends[1]], [grid])
    return helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)


def _join(models: "Sequence[ModelProto]") -> "ModelProto":
    """One graph of parts that find each other by the names of inputs and outputs; the last one's are its own."""
    from onnx import helper

    made = {value.name for model in models for value in model.graph.output}
    wanted = {value.name: value for model in models for value in model.graph.input if value.name not in made}
    nodes = [node for model in models for node in model.graph.node]
    weights = [weight for model in models for weight in model.graph.initializer]
    graph = helper.make_graph(nodes, "policy", list(wanted.values()), list(models[-1].graph.output), weights)
    return helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporters, which warn of their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
