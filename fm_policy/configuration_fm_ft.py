"""Configuration of the flow-matching policy: one flat record of everything that a checkpoint depends on."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import DiffuserSchedulerConfig

from fm_policy import checks
from fm_policy.flow.solvers import SOLVER_CALLS
from fm_policy.optimizer import FusedAdamWConfig
from fm_policy.windows import WindowedConfig


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
        nearest_steps: Solver steps to choose among them by; 0: as many as the robot makes. Fewer take less time, and
            choose nearly the same.
        reflow_steps: Euler steps of the base in the coupling `reflow`.
        solver: ODE solver of inference: `euler`, `midpoint`, `heun`, `rk4` or `dopri5`. Fine-tuning goes through
            it, so it must have a fixed grid.
        num_solver_steps: Steps of a fixed-grid solver from noise to chunk; `dopri5` chooses its own. A fine-tuned
            policy belongs to the grid that it was trained through.
        noise_scale: Standard deviation of the noise that a policy which acts makes its chunks of, and that fine-tuning
            and a head are trained on, too. Below 1, that of flow matching, chunks come nearer to one another and are
            smoother.
        variance: Of the likelihood of a reconstruction: `scalar`, eq. (6); `diagonal`, eq. (B.7), one fixed
            `sigma` per element; `learned`, the same with its log-determinant.
        sigma: Standard deviations for `diagonal` (and where `learned` starts), in units of the normalised action, from
            .0067 to 7.39: `action_dim` numbers for every time step, or `horizon * action_dim`, time by time.
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
    nearest_steps: int = 0
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
        checks.check(self)

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
                f"{solver} calls the network {calls} times per step: the NFE must be a positive multiple, got {wanted}"
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
        checks.check_features(self)
