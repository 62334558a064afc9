"""The configuration: arithmetic of time, what LeRobot reads, and every refusal by name."""

import math

import pytest
from lerobot.configs import FeatureType, PolicyFeature


def test_default_configuration_fits_lerobots_contract(tiny):
    config = tiny.config()
    assert config.type == "fm_ft"
    assert config.push_to_hub is False
    assert config.reward_delta_indices is None
    assert config.get_optimizer_preset().lr == 1e-4
    assert config.get_scheduler_preset().num_warmup_steps == 500


def test_fine_tuning_has_a_rate_of_its_own_and_keeps_it(tiny):
    config = tiny.config(stage="finetune", coupling="inverse", variance="diagonal", sigma=(0.1, 0.2, 0.3))
    assert config.get_optimizer_preset().lr == 5e-6
    schedule = config.get_scheduler_preset()
    assert (schedule.name, schedule.num_warmup_steps) == ("constant", 0)
    distilling = tiny.config(stage="finetune", coupling="reflow").get_scheduler_preset()
    assert (distilling.name, distilling.num_warmup_steps) == ("cosine", 0)


@pytest.mark.parametrize(
    ("n_obs_steps", "observed", "first_and_last_action", "chunk", "dropped"),
    [(1, [0], (0, 15), 16, 8), (2, [-1, 0], (-1, 14), 15, 7)],
)
def test_time_of_a_chunk(tiny, n_obs_steps, observed, first_and_last_action, chunk, dropped):
    config = tiny.config(n_obs_steps=n_obs_steps)
    assert config.observation_delta_indices == observed
    actions = config.action_delta_indices
    assert (actions[0], actions[-1]) == first_and_last_action
    assert len(actions) == config.horizon
    assert config.chunk_length == chunk
    assert config.drop_n_last_frames == dropped


def test_the_window_store_asks_lerobot_for_single_frames(tiny):
    config = tiny.config(window_store=True)
    assert config.observation_delta_indices is None
    assert config.action_delta_indices is None
    assert len(config.action_window) == 16


@pytest.mark.parametrize(
    ("solver", "steps", "nfe"), [("euler", 16, 16), ("heun", 2, 4), ("rk4", 3, 12), ("dopri5", 9, None)]
)
def test_nfe(tiny, solver, steps, nfe):
    assert tiny.config(solver=solver, num_solver_steps=steps).nfe == nfe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "finetun"}, "stage must be one of .* got 'finetun'"),
        ({"coupling": "random"}, "coupling must be one of .* got 'random'"),
        ({"coupling": "ot"}, "coupling='ot' is not for a policy: mini-batch optimal transport .* C2OT"),
        ({"stage": "finetune", "coupling": "ot"}, "coupling='ot' is not for a policy"),
        ({"coupling": "nearest"}, "coupling='nearest' is for stage 'finetune'"),
        ({"coupling": "inverse"}, "coupling='inverse' is for stage 'finetune'"),
        ({"coupling": "reflow"}, "coupling='reflow' is for stage 'finetune'"),
        ({"reflow_steps": 0}, "reflow_steps must be at least 1, got 0"),
        ({"observation_noise": -0.1}, "observation_noise must be finite and 0 or more, got -0.1"),
        ({"observation_noise": math.inf}, "observation_noise must be finite and 0 or more, got inf"),
        ({"train_encoder": False}, "train_encoder=False is for stage 'finetune'"),
        ({"variance": "full"}, "variance must be one of .* got 'full'"),
        ({"variance": "diagonal"}, "variance='diagonal' needs sigma"),
        (
            {"variance": "diagonal", "sigma": (0.1, 0.0, 0.1)},
            r"every sigma must be between 0.00674 and 7.39, got \[0.1, 0.0",
        ),
        ({"variance": "learned", "sigma": (0.1, 8.0, 0.1)}, "every sigma must be between 0.00674 and 7.39"),
        ({"variance": "learned", "sigma": (math.nan, 0.1, 0.1)}, "every sigma must be between .*nan"),
        ({"nearest_k": 0}, "nearest_k must be at least 1, got 0"),
        ({"nearest_steps": -1}, "nearest_steps must be finite and 0 or more, got -1"),
        ({"cfm_weight": -0.1}, "cfm_weight must be finite and 0 or more, got -0.1"),
        ({"cfm_weight": math.nan}, "cfm_weight must be finite and 0 or more, got nan"),
        ({"finetune_lr": -1.0}, "finetune_lr must be finite and 0 or more, got -1.0"),
        ({"optimizer_lr": math.inf}, "optimizer_lr must be finite and 0 or more, got inf"),
        ({"head_rate": math.nan}, "head_rate must be finite and positive, got nan"),
        ({"head_span": 0.0}, "head_span must be finite and positive, got 0.0"),
        ({"head_lr": math.nan}, "head_lr must be finite and 0 or more, got nan"),
        ({"solver": "ddim"}, "solver must be one of .* got 'ddim'"),
        ({"velocity_net": "mlp"}, "velocity_net must be one of .* got 'mlp'"),
        ({"vision_backbone": "vit"}, "vision_backbone must be one of .* got 'vit'"),
        ({"n_obs_steps": 0}, "n_obs_steps must be at least 1, got 0"),
        ({"num_solver_steps": 0}, "num_solver_steps must be at least 1, got 0"),
        ({"n_action_steps": 17}, "n_action_steps=17 exceeds the 16 actions"),
        ({"n_action_steps": 16, "n_obs_steps": 2}, "n_action_steps=16 exceeds the 15 actions"),
        ({"drop_n_last_frames": -1}, "drop_n_last_frames must be finite and 0 or more, got -1"),
        ({"horizon": 15}, "horizon=15 must be a multiple of 2"),
        ({"down_dims": ()}, "at least one level"),
        ({"down_dims": (16, 0)}, r"each at least 1 wide, got \(16, 0\)"),
        ({"n_groups": 0}, "n_groups must be at least 1, got 0"),
        ({"kernel_size": -3}, "kernel_size must be at least 1, got -3"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"down_dims": (16, 30)}, r"n_groups=4 must divide every entry of down_dims, not \[30\]"),
        ({"velocity_net": "transformer", "transformer_heads": 3}, "multiple of transformer_heads=3"),
        ({"velocity_net": "transformer", "transformer_heads": 0}, "transformer_heads must be at least 1, got 0"),
        ({"velocity_net": "transformer", "transformer_layers": 0}, "transformer_layers must be at least 1, got 0"),
        ({"transformer_dropout": 1.0}, "transformer_dropout must be in"),
        ({"ema_max_decay": 1.5}, "ema_max_decay must be in .* got 1.5"),
        ({"ema_power": math.nan}, "ema_power positive and finite, got 0.9999 and nan"),
        ({"crop_shape": (4,)}, r"crop_shape must be a height and a width, each at least 1, got \(4,\)"),
        ({"resize_shape": (0, 4)}, r"resize_shape must be a height and a width, .* got \(0, 4\)"),
        ({"crop_shape": (40, 40), "resize_shape": (32, 32)}, "must fit into resize_shape"),
        ({"spatial_softmax_num_keypoints": -1}, "must be finite and 0 or more, got -1"),
        ({"normalization_mapping": {"STATE": "MIN_MAX"}}, r"lacks \['ACTION', 'ENV', 'VISUAL'\]"),
    ],
)
def test_impossible_values_are_refused_by_name(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_features": {}}, "needs the output feature 'action'"),
        ({"input_features": {}}, "needs an image"),
        (
            {"variance": "diagonal", "sigma": (0.1, 0.2)},
            r"sigma needs 3 numbers \(one per action dimension\) or 48 \(one per element of a chunk\), got 2",
        ),
        ({"sigma": (0.1,) * 47}, "sigma needs 3 numbers .* got 47"),
        (
            {
                "input_features": {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 32, 32))},
                "crop_shape": (48, 48),
            },
            "is larger than 'observation.image'",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.policy(**changes)
