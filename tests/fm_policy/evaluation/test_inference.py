import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature

from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.baselines.modeling_dp_ema import DiffusionEmaPolicy
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.episodes import EpisodeKey
from fm_policy.evaluation.inference import ROW_BLOCK, episode_noise, episode_observation_noise
from fm_policy.evaluation.policies import ChunkPolicy
from fm_policy.flow.noise import sample_noise
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

STATES = {"observation.environment_state": (FeatureType.ENV, (16,)), "observation.state": (FeatureType.STATE, (2,))}
PIXELS = {"observation.image": (FeatureType.VISUAL, (3, 96, 96)), "observation.state": (FeatureType.STATE, (2,))}
SMALL_UNET = {"down_dims": (32, 64, 128), "time_embed_dim": 64}
HEAD = {"stage": "residual", "head": "control_synth", **SMALL_UNET}
SMALL_TRANSFORMER = {"velocity_net": "transformer", "transformer_dim": 128, "transformer_layers": 2}


def make_policy(features: dict, **fields) -> FlowMatchingPolicy:
    torch.manual_seed(0)
    inputs = {name: PolicyFeature(*feature) for name, feature in features.items()}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    config = FlowMatchingConfig(
        input_features=inputs, output_features=outputs, num_solver_steps=2, device="cpu", **fields
    )
    policy = FlowMatchingPolicy(config)
    with torch.no_grad():
        for parameter in policy.parameters():  # so that nothing is zero and hides what is before it
            parameter += 0.02 * torch.randn_like(parameter)
    return policy.eval()


def make_baseline(**fields) -> DiffusionEmaPolicy:
    torch.manual_seed(0)
    inputs = {name: PolicyFeature(*feature) for name, feature in STATES.items()}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    config = DiffusionEmaConfig(input_features=inputs, output_features=outputs, device="cpu", **fields)
    return DiffusionEmaPolicy(config).eval()


def chunks(policy: ChunkPolicy, rows: torch.Tensor) -> torch.Tensor:
    """Chunks of some rows of 32, which always hold the same observation and noise."""
    draw = torch.Generator().manual_seed(1)
    features = policy.config.input_features.items()
    batch = {name: torch.rand(32, 1, *feature.shape, generator=draw)[rows] for name, feature in features}
    noise = torch.randn(32, *policy.config.noise_shape, generator=draw)
    return policy.predict_action_chunk(batch, noise=noise[rows])


@pytest.mark.parametrize(
    ("features", "fields"),
    [
        pytest.param(STATES, SMALL_UNET, id="unet"),
        pytest.param(STATES, SMALL_TRANSFORMER, id="transformer"),
        pytest.param(PIXELS, SMALL_UNET, id="image"),
        pytest.param(STATES, HEAD, id="head"),
        pytest.param(STATES, {**HEAD, "head_layout": "chunk", "head_mode": "free"}, id="head-of-chunks"),
        pytest.param(STATES, {**HEAD, "head": "unet"}, id="head-unet"),
    ],
)
def test_blocks_of_rows_give_each_row_the_same_bits(features, fields):
    """What the evaluation builds on: wherever a row stands, and in a call of however many blocks."""
    check_rows(make_policy(features, **fields))


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_blocks_of_rows_give_each_row_of_the_baseline_the_same_bits(kind):
    steps = {"noise_scheduler_type": kind, "num_inference_steps": 3}
    check_rows(make_baseline(down_dims=(32, 64, 128), diffusion_step_embed_dim=64, **steps))


def check_rows(policy: ChunkPolicy) -> None:
    everything = chunks(policy, torch.arange(32))
    for rows in (torch.arange(32).flip(0), torch.arange(5, 5 + ROW_BLOCK)):
        assert torch.equal(chunks(policy, rows), everything[rows])


def test_threads_give_each_row_the_same_bits():
    policy = make_policy(STATES, down_dims=(32, 64), time_embed_dim=32)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(chunks(policy, torch.arange(ROW_BLOCK)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*answers)


def test_noise_of_an_episode_is_its_own():
    keys = [EpisodeKey(seed, repeat) for seed in (0, 1, 1000, 1001) for repeat in (0, 1)]
    sources = [source(key) for source in (episode_noise, episode_observation_noise) for key in keys]
    noise = torch.stack([sample_noise((4096,), source) for source in sources])
    again = torch.stack([sample_noise((4096,), episode_noise(key)) for key in keys])
    assert torch.equal(noise[: len(keys)], again)
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(len(sources))).abs().max() < 0.08  # five standard errors
    assert noise.std(dim=1) == pytest.approx(1.0, abs=0.06)
