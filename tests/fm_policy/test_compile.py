"""`compile_model`: the same chunks, by one captured graph whatever the number of calls, also where LeRobot compiles."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from fm_policy.modeling_fm_ft import FlowMatchingPolicy

# Of torch's own compiler, on import.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that are captured; they are run as they are, since the C++ compiler would take a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def test_the_net_is_compiled_once_and_acts_as_before(tiny, graphs):
    eager, compiled = tiny.policy().eval(), tiny.policy(compile_model=True).eval()
    compiled.load_state_dict(eager.state_dict())
    # As `lerobot-rollout --use_torch_compile=true` does, which sets `compile_model`, too.
    compiled.predict_action_chunk = torch.compile(compiled.predict_action_chunk)
    for calls in (1, 4, 2):
        noise = torch.randn(1, *eager.config.noise_shape)
        for policy in (eager, compiled):
            policy.config.set_solver(None, calls)
        observation = tiny.frame(eager.config, 1, seed=calls)
        chunks = [policy.predict_action_chunk(observation, noise) for policy in (eager, compiled)]
        torch.testing.assert_close(*chunks, rtol=1e-4, atol=1e-5)
        assert compiled.nfe == calls and graphs() == 1


def test_a_compiled_convolution_is_a_matrix_product(tiny):
    """Torch's own for few rows are slow, compiled as well."""
    seen = []

    def listen(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    conv = tiny.policy().net.velocity.shrink[0]
    with torch.no_grad():
        torch.compile(conv, backend=listen)(torch.randn(1, 16, 8))
    assert torch.nn.functional.linear in seen and torch.conv1d not in seen


def test_it_is_compiled_when_it_is_loaded(tiny, graphs, tmp_path):
    tiny.policy().save_pretrained(tmp_path)
    config = tiny.config(compile_model=True)
    policy = FlowMatchingPolicy.from_pretrained(tmp_path, config=config)
    assert graphs() == 1
    policy.select_action(tiny.frame(config, 1))
    assert graphs() == 1


def test_training_is_not_compiled(tiny, graphs):
    policy = tiny.policy(compile_model=True).train()
    loss, _ = policy(tiny.windows(policy.config))
    loss.backward()
    assert graphs() == 0


def test_a_checkpoint_is_the_same_compiled_or_not(tiny):
    assert [*tiny.policy(compile_model=True).state_dict()] == [*tiny.policy().state_dict()]
