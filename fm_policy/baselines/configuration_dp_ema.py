"""LeRobot's diffusion policy, configured for a fair comparison."""

import math
from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

from fm_policy.ema import check_schedule
from fm_policy.flow.noise import check_noise_scale
from fm_policy.windows import WindowedConfig

STOCHASTIC = "ddpm"
SOLVERS = (STOCHASTIC, "ddim")


@PreTrainedConfig.register_subclass("dp_ema")
@dataclass
class DiffusionEmaConfig(WindowedConfig, DiffusionConfig):
    """LeRobot's configuration with Diffusion Policy's horizons, every kind of feature normalised, and padding masked.

    The net that is trained is the same for DDPM and DDIM: `noise_scheduler_type` and `num_inference_steps` say how
    chunks are made of it, and an evaluation may choose anew.

    Args:
        window_store: See `FlowMatchingConfig`.
        observation_noise: See `FlowMatchingConfig`.
        noise_scale: See `FlowMatchingConfig`; of DDPM, of what its steps add, too.
        keep_statistics: See `FlowMatchingConfig`.
        ema_power: Exponent of the average's warm-up, decay = 1 - update^(-power).
        ema_max_decay: Upper bound of the decay.
    """

    n_obs_steps: int = 1
    horizon: int = 16
    n_action_steps: int = 8
    drop_n_last_frames: int = 8
    window_store: bool = False
    observation_noise: float = 0.0
    noise_scale: float = 1.0
    keep_statistics: bool = False

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MIN_MAX,
            "ENV": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    pretrained_backbone_weights: str | None = None
    use_group_norm: bool = True
    do_mask_loss_for_padding: bool = True

    ema_power: float = 0.75
    ema_max_decay: float = 0.9999

    push_to_hub: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise_scale(self.noise_scale)
        check_schedule(self.ema_power, self.ema_max_decay)
        if not 0 <= self.observation_noise < math.inf:
            raise ValueError(f"observation_noise must be finite and 0 or more, got {self.observation_noise}")

    @property
    def solver(self) -> str:
        """`ddpm`, which draws noise in every reverse step, or `ddim`, which draws none."""
        return self.noise_scheduler_type.lower()

    @property
    def num_solver_steps(self) -> int:
        """Reverse steps from noise to chunk."""
        return self.num_inference_steps or self.num_train_timesteps

    @property
    def nfe(self) -> int:
        """Calls of the net per chunk, one in each step."""
        return self.num_solver_steps

    @property
    def head_nfe(self) -> int:
        """There is no head."""
        return 0

    @property
    def trained_through_solver(self) -> bool:
        """The net is trained at all noise levels alike."""
        return False

    @property
    def chunk_length(self) -> int:
        """LeRobot's policy returns the actions that are to be executed."""
        return self.n_action_steps

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of all noise in a chunk: `(horizon, action_dim)`, and for DDPM one of it for each step."""
        steps = (self.num_solver_steps,) if self.solver == STOCHASTIC else ()
        return (*steps, self.horizon, *self.action_feature.shape)

    def set_solver(self, solver: str | None, nfe: int | None) -> None:
        """Choose solver and network calls per chunk, each as configured if None.

        Raises:
            ValueError: If the solver is unknown or has no such number of calls.
        """
        solver = self.solver if solver is None else solver
        nfe = self.nfe if nfe is None else nfe
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r} of a diffusion policy: expected one of {list(SOLVERS)}")
        if not 1 <= nfe <= self.num_train_timesteps:
            raise ValueError(f"the NFE of {solver} must be from 1 to {self.num_train_timesteps}, got {nfe}")
        self.noise_scheduler_type, self.num_inference_steps = solver.upper(), nfe
