"""Configuration of the flow-matching policy: one flat record of everything that a checkpoint depends on."""

import math
from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import DiffuserSchedulerConfig
from lerobot.utils.constants import ACTION

from fm_policy.deploy.rtc import METHODS
from fm_policy.flow.coupling import COUPLINGS, REFUSED
from fm_policy.flow.noise import check_noise_scale
from fm_policy.flow.solvers import SOLVER_CALLS
from fm_policy.optimizer import FusedAdamWConfig
from fm_policy.residual.control_synth import LAYOUTS
from fm_policy.residual.matrices import PARAMETRISATIONS
from fm_policy.residual.nonlinearities import NONLINEARITIES
from fm_policy.residual.stability import PENALTIES
from fm_policy.windows import WindowedConfig

STAGES = ("pretrain", "finetune", "residual")
HEADS = (None, "control_synth", "unet")
VARIANCES = ("scalar", "diagonal", "learned")
VELOCITY_NETS = ("unet", "transformer")
BACKBONES = ("resnet18", "resnet34")


@PreTrainedConfig.register_subclass("fm_ft")
@dataclass
class FlowMatchingConfig(WindowedConfig, PreTrainedConfig):
    """Everything that a flow-matching policy is made of. Fields are only ever added, never renamed.

    Time of a chunk, with `n_obs_steps` = 2, `horizon` = 16, `n_action_steps` = 8 (o: seen, *: predicted,
    x: executed; the present is step 0):

        step       -1  0  1  2  3  4  5  6  7  8 ... 14
        observed    o  o
        predicted   *  *  *  *  *  *  *  *  *  * ...  *
        executed       x  x  x  x  x  x  x  x

    Args:
        n_obs_steps: Observations that the policy sees, the present one included.
        horizon: Actions in a chunk, the first one belonging to the first observation.
        n_action_steps: Actions executed before the next chunk is computed.
        drop_n_last_frames: Frames at the end of an episode that training does not start from; None:
            `horizon - n_action_steps - n_obs_steps + 1`, as in LeRobot's diffusion policy.
        window_store: Training reads its windows from a memory-mapped copy of the data set that is built
            once (see `fm_policy.window_store`), instead of LeRobot's loader gathering them frame by frame.
        normalization_mapping: How each kind of feature is normalised. Actions must end in [-1, 1].
        action_feature_names: Names of the action's numbers, filled in by LeRobot from the data set.
        resize_shape: Height and width to which every image is resized first; None: not.
        crop_shape: Height and width of a crop, taken after resizing; None: none.
        crop_is_random: The crop is random in training (and central otherwise); False: always central.
        vision_backbone: torchvision ResNet, `resnet18` or `resnet34`, always from random weights.
        use_group_norm: GroupNorm instead of BatchNorm, which an average of weights does not suit.
        spatial_softmax_num_keypoints: Keypoints of a spatial softmax; 0: global average pooling.
        use_separate_rgb_encoder_per_camera: One encoder for each camera, or one shared by all.
        velocity_net: `unet` or `transformer`.
        down_dims: Channels of the U-Net's levels; (256, 512, 1024) is the paper's, (64, 128, 256) suits a CPU.
        kernel_size: Width of the U-Net's convolutions, odd.
        n_groups: Groups of the U-Net's group norm; divides every entry of `down_dims`.
        time_embed_dim: Width of the U-Net's time embedding, even.
        transformer_dim: Width of the Transformer.
        transformer_layers: Number of its blocks.
        transformer_heads: Attention heads; divides `transformer_dim`.
        transformer_dropout: Dropout probability.
        stage: `pretrain`: conditional flow matching, eq. (3). `finetune`: maximum likelihood of the chunks that the
            solver makes, eq. (6); starts from a pre-trained policy's averaged weights, or from scratch.
            `residual`: the same likelihood of what a head makes of these chunks, the base as it is.
        coupling: How noise is paired with data: `independent`, and when fine-tuning also `nearest` (of `nearest_k`
            noises the one whose chunk comes nearest to the data), `inverse` (the data carried back to noise
            by the base) or `reflow` (noise and the chunk that the base makes of it in `reflow_steps`, in place of the
            data). See `fm_policy.flow.coupling`.
        nearest_k: Noises to choose from in the coupling `nearest`.
        reflow_steps: Euler steps of the base in the coupling `reflow`.
        solver: ODE solver of inference: `euler`, `midpoint`, `heun`, `rk4` or `dopri5`. Fine-tuning goes through
            it, so it must have a fixed grid.
        num_solver_steps: Steps of a fixed-grid solver from noise to chunk; `dopri5` chooses its own. A fine-tuned
            policy belongs to the grid that it was trained through.
        noise_scale: Standard deviation of the noise that a policy which acts makes its chunks of. Below 1, that of
            training, they come nearer to one another and are smoother.
        variance: Of the likelihood of a reconstruction: `scalar`, eq. (6); `diagonal`, eq. (B.7), one fixed
            `sigma` per element; `learned`, the same with its log-determinant.
        sigma: Standard deviations for `diagonal` (and where `learned` starts), in units of the normalised action:
            `action_dim` numbers for every time step, or `horizon * action_dim`, time by time.
        cfm_weight: Weight of the flow-matching loss, eq. (3), that remains beside the likelihood in fine-tuning.
        checkpoint_solver: Fine-tuning keeps only the states between solver steps and computes the rest again in
            the backward pass: the memory of one step, for about a third more time.
        train_encoder: Fine-tuning trains the observation encoder along; False: it stays the base's.
        observation_noise: Standard deviation of the Gaussian noise on the normalised numbers of an observation in
            training, with which few demonstrations cover their neighbourhood; pictures have none. A base that pairs
            are made by (`inverse`, `reflow`) sees the same noise.
        head: What carries the flow's chunk on, from t = 1 to 1 + `head_span`, in stage `residual`: `control_synth`,
            eq. (7), whose stability can be certified, or `unet`, the ablation; None in the other stages.
        head_mode: Matrices of `control_synth`: `constructed` contracts at `head_rate` whatever it learns, `penalty` is
            driven towards stability by a loss, `free` is neither.
        head_layout: `shared`: one system for every action of a chunk; `chunk`: one for the chunk as a whole.
        head_activations: Its nonlinearities f_j: `tanh`, `leaky_relu`, `prelu`.
        head_width: Units of each of them.
        head_rate: Rate of contraction per unit of time, of `constructed` at least and of the others at the start. Over
            the head the chunks of one observation approach each other by exp(-head_rate head_span) or more.
        head_span: T_r, the length of the head's time.
        head_steps: Euler steps of the head.
        head_penalty: Of head_mode `penalty`: `linear` (the paper's hinge on the rows of A0), `row` (the rows of the
            whole Jacobian) or `certificate` (the contraction LMI at balanced multipliers).
        head_penalty_weight: Its weight.
        head_penalty_margin: Its margin, a rate.
        train_base: Train the base along with the head, at `finetune_lr`.
        rtc_method: How in LeRobot's real-time chunking a new chunk goes on from what is left of the last one: guided
            towards it, `direct` or by the `gradient` of the paper, which takes a backward pass for each network call,
            or from a `warm_start`. See `fm_policy.deploy.rtc`.
        rtc_warm_start: Time in (0, 1) at which the flow of a `warm_start` starts, between noise and what is left.
        compile_model: Compile the velocity net for a policy that acts: loading takes half a minute longer and, for a
            CPU, a C++ compiler; a robot's chunk then takes two thirds to three quarters of its time there.
            `lerobot-rollout --use_torch_compile=true` sets it.
        keep_statistics: A training that starts from a policy, on a data set with other statistics, keeps that policy's
            normalisation; False: such a data set is refused.
        use_ema: Keep a moving average of the weights, and use it whenever the policy is not training.
        ema_power: Exponent of the average's warm-up, decay = 1 - update^(-power).
        ema_max_decay: Upper bound of the decay.
        head_lr: Learning rate of the head, which starts from nothing, constant.
        finetune_lr: Learning rate of fine-tuning, constant; of `reflow` the first one of a cosine's fall to nothing.
            `optimizer_lr` and the schedule are those of pre-training: a later stage inherits them from its base and
            does not use them.
        optimizer_lr: Peak learning rate of AdamW in pre-training.
        optimizer_betas: Its betas.
        optimizer_weight_decay: Its weight decay.
        scheduler_name: Schedule of the learning rate, a name of diffusers' `get_scheduler`.
        scheduler_warmup_steps: Steps of linear warm-up.
    """

    n_obs_steps: int = 1
    horizon: int = 16
    n_action_steps: int = 8
    drop_n_last_frames: int | None = None
    window_store: bool = False

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MIN_MAX,
            "ENV": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    action_feature_names: list[str] | None = None
    resize_shape: tuple[int, int] | None = None
    crop_shape: tuple[int, int] | None = None
    crop_is_random: bool = True

    vision_backbone: str = "resnet18"
    use_group_norm: bool = True
    spatial_softmax_num_keypoints: int = 0
    use_separate_rgb_encoder_per_camera: bool = False

    velocity_net: str = "unet"
    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    n_groups: int = 8
    time_embed_dim: int = 256
    transformer_dim: int = 512
    transformer_layers: int = 6
    transformer_heads: int = 8
    transformer_dropout: float = 0.1

    stage: str = "pretrain"
    coupling: str = "independent"
    nearest_k: int = 5
    reflow_steps: int = 16
    solver: str = "euler"
    num_solver_steps: int = 16
    noise_scale: float = 1.0

    variance: str = "scalar"
    sigma: tuple[float, ...] = ()
    cfm_weight: float = 0.0
    checkpoint_solver: bool = False
    train_encoder: bool = True
    observation_noise: float = 0.0

    head: str | None = None
    head_mode: str = "constructed"
    head_layout: str = "shared"
    head_activations: tuple[str, ...] = ("tanh", "leaky_relu")
    head_width: int = 64
    head_rate: float = 0.02
    head_span: float = 0.25
    head_steps: int = 4
    head_penalty: str = "row"
    head_penalty_weight: float = 0.1
    head_penalty_margin: float = 0.02
    train_base: bool = False
    head_lr: float = 1e-3

    rtc_method: str = "direct"
    rtc_warm_start: float = 0.75
    compile_model: bool = False

    keep_statistics: bool = False
    finetune_lr: float = 5e-6

    use_ema: bool = True
    ema_power: float = 0.75
    ema_max_decay: float = 0.9999

    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.95, 0.999)
    optimizer_weight_decay: float = 1e-6
    scheduler_name: str = "cosine"
    scheduler_warmup_steps: int = 500

    push_to_hub: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_n_last_frames is None:
            self.drop_n_last_frames = max(0, self.horizon - self.n_action_steps - self.n_obs_steps + 1)
        self._check_choices()
        self._check_time()
        self._check_finetuning()
        self._check_head()
        self._check_nets()
        self._check_images()
        self._check_normalization()

    def _check_choices(self) -> None:
        choices = {
            "stage": STAGES,
            "coupling": tuple(COUPLINGS),
            "variance": VARIANCES,
            "head": HEADS,
            "head_mode": tuple(PARAMETRISATIONS),
            "head_layout": LAYOUTS,
            "head_penalty": tuple(PENALTIES),
            "solver": tuple(SOLVER_CALLS),
            "velocity_net": VELOCITY_NETS,
            "vision_backbone": BACKBONES,
            "rtc_method": METHODS,
        }
        if self.coupling in REFUSED:
            raise ValueError(f"coupling={self.coupling!r} is not for a policy: {REFUSED[self.coupling]}")
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")

    def _check_time(self) -> None:
        for name in ("n_obs_steps", "horizon", "n_action_steps", "num_solver_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.drop_n_last_frames < 0:  # type: ignore[operator]
            raise ValueError(f"drop_n_last_frames must not be negative, got {self.drop_n_last_frames}")
        check_noise_scale(self.noise_scale)
        if not 0 < self.rtc_warm_start < 1:
            raise ValueError(f"rtc_warm_start must be a time in (0, 1), got {self.rtc_warm_start}")
        if self.n_action_steps > self.chunk_length:
            raise ValueError(
                f"n_action_steps={self.n_action_steps} exceeds the {self.chunk_length} actions from the present "
                f"on that a chunk holds (horizon={self.horizon} - n_obs_steps={self.n_obs_steps} + 1)"
            )

    def _check_finetuning(self) -> None:
        if not 0 <= self.observation_noise < math.inf:
            raise ValueError(f"observation_noise must be finite and 0 or more, got {self.observation_noise}")
        for name in ("nearest_k", "reflow_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cfm_weight < 0 or self.finetune_lr < 0:
            raise ValueError(
                f"cfm_weight and finetune_lr must not be negative, got {self.cfm_weight} and {self.finetune_lr}"
            )
        if any(sigma <= 0 for sigma in self.sigma):
            raise ValueError(f"every sigma must be positive, got {list(self.sigma)}")
        if self.variance == "diagonal" and not self.sigma:
            raise ValueError("variance='diagonal' needs sigma: one number per action dimension, or per element")
        if self.stage == "pretrain" and self.coupling != "independent":
            raise ValueError(
                f"coupling={self.coupling!r} is for stage 'finetune': flow matching needs 'independent' pairs"
            )
        if self.stage == "pretrain" and not self.train_encoder:
            raise ValueError("train_encoder=False is for stage 'finetune': pre-training starts from random weights")

    def _check_head(self) -> None:
        if (self.stage == "residual") != (self.head is not None):
            wanted = "needs a head: 'control_synth' or 'unet'" if self.head is None else "has no head"
            raise ValueError(f"stage {self.stage!r} {wanted}, got head={self.head!r}")
        unknown = set(self.head_activations) - set(NONLINEARITIES)
        if unknown or not self.head_activations:
            raise ValueError(
                f"head_activations must be some of {list(NONLINEARITIES)}, on the command line as '[\"tanh\"]', "
                f"got {list(self.head_activations)}"
            )
        for name in ("head_width", "head_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("head_rate", "head_span"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("head_penalty_weight", "head_penalty_margin", "head_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.stage == "residual" and self.cfm_weight and not self.train_base:
            raise ValueError(f"cfm_weight={self.cfm_weight} is a loss of the base, which train_base=False leaves alone")

    def _check_nets(self) -> None:
        if self.velocity_net == "unet":
            self._check_unet()
        elif self.transformer_dim % self.transformer_heads:
            raise ValueError(
                f"transformer_dim={self.transformer_dim} must be a multiple of "
                f"transformer_heads={self.transformer_heads}"
            )
        if not 0 <= self.transformer_dropout < 1:
            raise ValueError(f"transformer_dropout must be in [0, 1), got {self.transformer_dropout}")
        if not 0 <= self.ema_max_decay <= 1 or self.ema_power <= 0:
            raise ValueError(
                f"ema_max_decay must be in [0, 1] and ema_power positive, got {self.ema_max_decay} and {self.ema_power}"
            )

    def _check_unet(self) -> None:
        if not self.down_dims:
            raise ValueError("down_dims needs at least one level, got none")
        shrink = 2 ** (len(self.down_dims) - 1)
        if self.horizon % shrink:
            raise ValueError(
                f"horizon={self.horizon} must be a multiple of {shrink}: a U-Net of {len(self.down_dims)} levels "
                f"(down_dims={tuple(self.down_dims)}) halves it {len(self.down_dims) - 1} times"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        uneven = [dim for dim in self.down_dims if dim % self.n_groups]
        if uneven:
            raise ValueError(f"n_groups={self.n_groups} must divide every entry of down_dims, not {uneven}")

    def _check_images(self) -> None:
        if self.crop_shape and self.resize_shape:
            larger = [c > r for c, r in zip(self.crop_shape, self.resize_shape, strict=True)]
            if any(larger):
                raise ValueError(f"crop_shape={self.crop_shape} must fit into resize_shape={self.resize_shape}")
        if self.spatial_softmax_num_keypoints < 0:
            raise ValueError(
                f"spatial_softmax_num_keypoints must not be negative, got {self.spatial_softmax_num_keypoints}"
            )

    def _check_normalization(self) -> None:
        # LeRobot leaves a kind that is not named here unnormalised, without a word.
        missing = {"VISUAL", "STATE", "ENV", "ACTION"} - set(self.normalization_mapping)
        if missing:
            raise ValueError(f"normalization_mapping lacks {sorted(missing)}: name every kind of feature")

    @property
    def chunk_length(self) -> int:
        """Predicted actions from the present on."""
        return self.horizon - self.n_obs_steps + 1

    @property
    def trains_flow(self) -> bool:
        """Whether this stage trains the velocity net."""
        return self.stage != "residual" or self.train_base

    @property
    def trains_encoder(self) -> bool:
        """Whether this stage trains the observation encoder."""
        return self.trains_flow and self.train_encoder

    @property
    def head_nfe(self) -> int:
        """Calls of the head per chunk."""
        return self.head_steps if self.head else 0

    @property
    def nfe(self) -> int | None:
        """Calls of the velocity net per chunk; None for the adaptive `dopri5`."""
        calls = SOLVER_CALLS[self.solver]
        return None if calls is None else calls * self.num_solver_steps

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that a chunk is made of: x0, `(horizon, action_dim)`."""
        return (self.horizon, *self.action_feature.shape)

    @property
    def trained_through_solver(self) -> bool:
        """Whether the policy belongs to the grid that it is configured for."""
        return self.stage != "pretrain"

    def set_solver(self, solver: str | None, nfe: int | None) -> None:
        """Choose solver and network calls per chunk, each as configured if None.

        Raises:
            ValueError: If the solver is unknown or its steps do not add up to the network calls.
        """
        solver = self.solver if solver is None else solver
        if solver not in SOLVER_CALLS:
            raise ValueError(f"unknown solver {solver!r}: expected one of {list(SOLVER_CALLS)}")
        calls = SOLVER_CALLS[solver]
        if calls is None and nfe is not None:
            raise ValueError(f"{solver} chooses its own number of network calls, NFE {nfe} cannot be set")
        wanted = self.nfe if nfe is None else nfe
        if calls is not None and (wanted is None or wanted < 1 or wanted % calls):
            raise ValueError(
                f"{solver} calls the network {calls} times per step: the NFE must be a multiple, got {wanted}"
            )
        self.solver = solver
        if calls is not None and wanted is not None:
            self.num_solver_steps = wanted // calls

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not used."""
        return None

    def get_optimizer_preset(self) -> FusedAdamWConfig:
        """AdamW with the fields above, and the stage's learning rate."""
        return FusedAdamWConfig(
            lr={"pretrain": self.optimizer_lr, "finetune": self.finetune_lr, "residual": self.head_lr}[self.stage],
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            eps=1e-8,
            grad_clip_norm=10.0,
        )

    def get_scheduler_preset(self) -> DiffuserSchedulerConfig:
        """The schedule named above in pre-training, a constant learning rate later; for `reflow` it falls to nothing.

        Fine-tuning on data ends before it over-fits. A frozen base answers to every noise: there is an end to come to.
        """
        if self.stage == "pretrain":
            return DiffuserSchedulerConfig(name=self.scheduler_name, num_warmup_steps=self.scheduler_warmup_steps)
        name = "cosine" if self.coupling == "reflow" else "constant"
        return DiffuserSchedulerConfig(name=name, num_warmup_steps=0)

    def validate_features(self) -> None:
        """Check that there is something to observe and one action to predict.

        Raises:
            ValueError: If not, or if an image is smaller than the crop.
        """
        if self.action_feature is None:
            raise ValueError(f"the policy needs the output feature '{ACTION}', got {list(self.output_features or {})}")
        if not (self.image_features or self.robot_state_feature or self.env_state_feature):
            raise ValueError(
                "the policy needs an image, 'observation.state' or 'observation.environment_state' to observe, "
                f"got {list(self.input_features or {})}"
            )
        elements = self.horizon * self.action_feature.shape[0]
        if len(self.sigma) not in (0, elements // self.horizon, elements):
            raise ValueError(
                f"sigma needs {elements // self.horizon} numbers (one per action dimension) or {elements} (one per "
                f"element of a chunk), got {len(self.sigma)}"
            )
        for name, feature in self.image_features.items():
            height_width = self.resize_shape or feature.shape[1:]
            if self.crop_shape and any(c > s for c, s in zip(self.crop_shape, height_width, strict=True)):
                raise ValueError(f"crop_shape={self.crop_shape} is larger than '{name}' of {tuple(height_width)}")
