"""The flow-matching policy: LeRobot's contract around `flow`, `velocity` and `encoders`, and nothing else.

Data contract
    observations  (B, n_obs_steps, *shape)   normalised; what the robot sees, oldest first
    o             (B, obs_dim)               their features, computed once per chunk
    x             (B, horizon, action_dim)   normalised to [-1, 1]
    t             scalar or (B,)             0 is noise, 1 is data (openpi and LeRobot's RTC count the other way)
"""

import copy
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, cast

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import ACTION
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fm_policy import contract, held_out, likelihood, model_card, normalization, stages, window_store
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.deploy import rtc
from fm_policy.ema import ema_decay, ema_update
from fm_policy.flow.coupling import TAUGHT, independent
from fm_policy.flow.diagnostics import StepGradients
from fm_policy.flow.losses import Reduction, cfm_loss
from fm_policy.flow.noise import disturbed, sample_noise
from fm_policy.flow.solvers import CountedVelocity, Velocity
from fm_policy.net import FlowMatchingNet
from fm_policy.repeatable import of_step
from fm_policy.velocity.unet1d import lay_weights


class FlowMatchingPolicy(PreTrainedPolicy):
    """A policy that carries noise to a chunk of actions along a learned velocity field.

    Args:
        config: The configuration, with its input and output features.
        dataset_meta: The data set to train on, handed in by LeRobot's trainer; opens the window store.
        **kwargs: What else LeRobot hands in, unused.
    """

    config_class = FlowMatchingConfig
    name = "fm_ft"
    _action_queue_attrs = ("_queues",)

    def __init__(self, config: FlowMatchingConfig, dataset_meta: Any = None, **kwargs: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.config: FlowMatchingConfig = config
        self.net = FlowMatchingNet(config)
        if config.use_ema:
            self.ema_net = copy.deepcopy(self.net).requires_grad_(False)
            self.register_buffer("ema_updates", torch.zeros((), dtype=torch.int64))
        if config.compile_model:
            (self.ema_net if config.use_ema else self.net).velocity.compile()
        self.net.encoder.requires_grad_(config.trains_encoder)
        self.net.velocity.requires_grad_(config.trains_flow)
        if config.stage != "pretrain" and dataset_meta is not None:
            self._keep_base()
        self._trains = dataset_meta is not None
        if dataset_meta is not None:
            self._prepare_data(dataset_meta)
        if config.variance != "scalar":
            self._add_variance()
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64))  # see `of_step`
        self.nfe = config.nfe or 0
        self._held_out = held_out.HeldOutMeans()
        self._gradients: StepGradients | None = None
        self.reset()

    def _prepare_data(self, meta: Any) -> None:
        """See to what LeRobot's trainer will make of the data set: its windows and its normalisation."""
        config = self.config
        if config.window_store:
            window_store.attach(window_store.of_policy(meta, config, config.input_features or {}))
        normalization.prepare(config, meta)

    def _keep_base(self) -> None:
        config = self.config
        if config.nfe is None:
            raise ValueError(f"fine-tuning goes through a fixed grid, which solver={config.solver!r} has not")
        from_scratch = config.pretrained_path is None and hasattr(config, "_runtime_dataset_meta")  # LeRobot's trainer
        if from_scratch and config.coupling in TAUGHT:
            raise ValueError(f"coupling={config.coupling!r} learns from a trained policy: --policy.path=DIR names it")
        self.base_net = copy.deepcopy(self.net).requires_grad_(False)
        self.base_net.head = None

    def _add_variance(self) -> None:
        initial = likelihood.initial_log_variance(self.config)
        if self.config.variance == "learned":
            self.log_variance = nn.Parameter(initial)
        else:
            self.register_buffer("log_variance", initial, persistent=False)

    @property
    def active_net(self) -> FlowMatchingNet:
        """The net in training, or its moving average whenever the policy is not training."""
        return self.ema_net if self.config.use_ema and not self.training else self.net

    # ------------------------------------------------------------------ training

    def get_optim_params(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        """The parameters to train, without the net's copies; in groups where some have a rate of their own."""
        config, net = self.config, self.net
        head = [] if net.head is None else list(net.head.parameters())
        flow = [p for part in (net.encoder, net.velocity) for p in part.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": head or flow}]
        if head and flow:
            groups.append({"params": flow, "lr": config.finetune_lr})
        if config.variance == "learned":
            groups.append({"params": [self.log_variance], "lr": likelihood.VARIANCE_LR, "weight_decay": 0.0})
        return groups if len(groups) > 1 else groups[0]["params"]

    def train(self, mode: bool = True) -> Self:
        """Switch training mode; what is not trained stays in evaluation mode, and so does the map after pre-training.

        The later stages train the map that the robot runs, which has no dropout.
        """
        super().train(mode)
        still = [getattr(self, name) for name in ("ema_net", "base_net") if hasattr(self, name)]
        if self.config.stage != "pretrain":
            still.append(self.net.velocity)
        if not self.config.trains_encoder:
            still.append(self.net.encoder)
        for module in still:
            module.eval()
        # What an optimiser moves lies as torch lays it: LeRobot saves contiguous tensors only.
        lay_weights(self.net, channels_last=not (mode or self._trains))
        if self.config.use_ema:
            lay_weights(self.ema_net, channels_last=not mode)
        if hasattr(self, "base_net"):
            lay_weights(self.base_net, channels_last=True)
        return self

    def forward(self, batch: dict[str, Tensor], reduction: Reduction = "mean") -> tuple[Tensor, dict[str, float]]:
        """The loss of the stage: conditional flow matching, eq. (3), or the likelihood of reconstructions, eq. (6).

        Args:
            batch: Preprocessed windows: observations `(B, n_obs_steps, *shape)`, `action`
                `(B, horizon, action_dim)`, and optionally `action_is_pad` `(B, horizon)`.
            reduction: "mean" for a scalar, "none" for one loss per sample, `(B,)`.

        Returns:
            The loss, and what to log: `cfm_loss` where it is part of the loss; in stage `finetune`
            `reconstruction_error`, the mean squared error of the chunks that the solver makes (`distillation_error`,
            where they are held against the base's), and `grad_step_<n>`, the norms of the last step's gradient with
            respect to the velocities of solver step n; in evaluation mode the numbers of `held_out.measure`. LeRobot
            discards these: the training steps that follow log their means.

        Raises:
            ValueError: If the windows do not have the shapes above.
        """
        contract.check_windows(self.config, batch)
        with of_step(self.training, self.training_steps):
            if self.training:
                batch = disturbed(batch, self.net.encoder.numbers, self.config.observation_noise)
            o = self._encode(batch)
            stage_loss = self._cfm if self.config.stage == "pretrain" else self._likelihood
            loss, logs = stage_loss(batch, o, reduction)
            if not self.training:
                measured = held_out.measure(self.config, self.active_net, getattr(self, "base_net", None), batch, o)
                self._held_out.add(measured)
                return loss, logs | measured
        return loss, logs | self._held_out.logs()

    def _encode(self, batch: dict[str, Tensor]) -> Tensor:
        with nullcontext() if self.config.trains_encoder else torch.no_grad():
            return self.active_net.encoder(batch)

    def _cfm(self, batch: dict[str, Tensor], o: Tensor, reduction: Reduction) -> tuple[Tensor, dict[str, float]]:
        x1, is_pad = batch[ACTION], batch.get(f"{ACTION}_is_pad")
        loss = cfm_loss(self.active_net.velocity.bind(o), independent(x1), x1, is_pad, reduction)
        return loss, {"cfm_loss": loss.mean().item()}

    def _likelihood(self, batch: dict[str, Tensor], o: Tensor, reduction: Reduction) -> tuple[Tensor, dict[str, float]]:
        """See `fm_policy.likelihood`; by its exact gradient, through every step of the solver."""
        config, net = self.config, self.active_net
        x0, x1, is_pad = likelihood.pairs(config, net, getattr(self, "base_net", None), batch, o)
        logs = {} if self._gradients is None else self._gradients.logs()
        self._gradients = StepGradients(net.bind(config, o), config.num_solver_steps)
        chunk = net.chunk(config, x0, o, self._gradients)
        log_variance = getattr(self, "log_variance", None)
        loss, found = likelihood.reconstruction_loss(config, chunk, x1, is_pad, log_variance, reduction)
        logs |= found
        if config.cfm_weight:
            remaining, found = self._cfm(batch, o, reduction)
            loss, logs = loss + config.cfm_weight * remaining, logs | found
        penalty, found = likelihood.head_penalty(config, net)
        return loss + penalty, logs | found

    def reconstruct(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The chunks that the deployed policy makes of training windows, with gradients where they are enabled.

        Args:
            batch: As for `forward`.
            noise: As for `predict_action_chunk`.

        Returns:
            Normalised chunks from the first observation on, `(B, horizon, action_dim)`.
        """
        contract.check_windows(self.config, batch)
        x1 = batch[ACTION]
        noise = independent(x1) if noise is None else noise
        contract.check_noise(noise, tuple(x1.shape))
        return self.active_net.chunk(self.config, self.config.noise_scale * noise.to(x1), self._encode(batch))

    def update(self) -> None:
        """Move the average of the weights; LeRobot's trainer calls this after every optimiser step."""
        if self.config.use_ema:
            self.ema_updates += 1
            decay = ema_decay(int(self.ema_updates), self.config.ema_power, self.config.ema_max_decay)
            ema_update(self.ema_net, self.net, decay)

    # ------------------------------------------------------------------ inference

    def reset(self) -> None:
        """Forget the history and the queued actions; to be called when an episode starts."""
        self._queues: dict[str, deque[Tensor]] = {
            name: deque(maxlen=self.config.n_obs_steps) for name in self.config.input_features or {}
        }
        self._queues[ACTION] = deque(maxlen=self.config.n_action_steps)

    @torch.no_grad()
    def select_action(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The action to execute now; computes a chunk whenever the last one is used up.

        Args:
            batch: Preprocessed present observation, each feature `(B, *shape)`.
            noise: As for `predict_action_chunk`, if a chunk is computed now.
            generator: Source of that noise, if it is not given.

        Returns:
            Normalised action, `(B, action_dim)`.

        Raises:
            ValueError: If the observation is missing, misshapen or not finite: it is no part of the history then; or of
                another batch size than the episode's.
        """
        observation = contract.observation(self.config, batch)
        contract.check_frames(self.config, observation)
        self._check_batch_size(observation)
        populate_queues(self._queues, observation)
        if not self._queues[ACTION]:
            history = {name: torch.stack(list(self._queues[name]), dim=1) for name in observation}
            chunk = self.predict_action_chunk(history, noise, generator)
            self._queues[ACTION].extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._queues[ACTION].popleft()

    @torch.compiler.disable  # LeRobot would compile the solver with all its calls of the net: see `compile_model`
    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
    ) -> Tensor:
        """The chunk for an observation, from noise through the solver. Keeps and needs no history of its own.

        Args:
            batch: Preprocessed observations: a history, each feature `(B, n_obs_steps, *shape)`, or one raw
                frame, `(B, *shape)`, which then stands for the whole history.
            noise: Standard normal, `(B, horizon, action_dim)`: x0 is `noise_scale` times it; drawn if not given.
            generator: Its source, if it is not given.
            inference_delay: In real-time chunking, actions of the last chunk that are executed meanwhile.
            prev_chunk_left_over: What is left of it after the present action, normalised, `(T, action_dim)`; the chunk
                then goes on from there, see `fm_policy.deploy.rtc`. None: the chunk stands alone.

        Returns:
            Normalised actions from the present on, `(B, horizon - n_obs_steps + 1, action_dim)`.

        Raises:
            ValueError: If an observation is missing, misshapen or not finite, or the noise or what is left misshapen.
        """
        history = contract.history(self.config, contract.observation(self.config, batch))
        o = self.active_net.encoder(history)
        shape = (len(o), self.config.horizon, self._action_dim)
        if noise is None:
            noise = sample_noise(shape, generator, device=o.device, dtype=o.dtype)
        contract.check_noise(noise, shape)
        v = CountedVelocity(self.active_net.bind(self.config, o))
        x0, steered, start = self.config.noise_scale * noise.to(o), cast(Velocity, v), 0.0
        if prev_chunk_left_over is not None:
            contract.check_left_over(prev_chunk_left_over, self._action_dim, inference_delay)
            left_over, delay = prev_chunk_left_over.to(o), inference_delay or 0
            x0, steered, start = rtc.continued(self.config, x0, v, left_over, delay)
        chunk = self.active_net.chunk(self.config, x0, o, steered, start)
        self.nfe = v.calls
        return chunk[:, self.config.n_obs_steps - 1 :]

    def supports_rtc(self) -> bool:
        """Whether LeRobot's real-time chunking can run this policy: it can."""
        return True

    @property
    def _action_dim(self) -> int:
        return self.config.action_feature.shape[0]

    def _check_batch_size(self, observation: dict[str, Tensor]) -> None:
        name, value = next(iter(observation.items()))
        queue = self._queues[name]
        if queue and len(queue[-1]) != len(value):
            raise ValueError(
                f"the batch size went from {len(queue[-1])} to {len(value)} within an episode: call reset() first"
            )

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As LeRobot's; what is to be compiled is compiled now, and not while a robot waits for its first chunk."""
        policy = super().from_pretrained(*args, **kwargs)
        config = policy.config
        if config.compile_model:
            shapes = {name: feature.shape for name, feature in (config.input_features or {}).items()}
            still = {name: torch.zeros(1, *shape, device=config.device) for name, shape in shapes.items()}
            policy.predict_action_chunk(still, noise=torch.zeros(1, *config.noise_shape))
        return policy

    @classmethod
    def _load_as_safetensor(
        cls, model: "FlowMatchingPolicy", model_file: str, map_location: str, strict: bool
    ) -> "FlowMatchingPolicy":
        """Load weights; unlike LeRobot's, refuse a file that does not fit, and a base that a stage cannot start from.

        Raises:
            ValueError: Naming the file if it cannot be read, or every missing, unexpected or wrongly shaped weight; or
                as the functions of `stages`.
        """
        folder = Path(model_file).parent
        new_stage = stages.starts_new_stage(model.config, folder, model._trains)
        normalization.keep_statistics(model.config, folder)
        try:
            with safe_open(model_file, framework="pt", device=str(map_location)) as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{model_file} is broken, perhaps cut off when it was copied: {error}") from error
        fresh = model.state_dict()
        weights = (stages.first_weights if new_stage else stages.completed_weights)(weights, fresh)
        stages.check_weights(fresh, weights, model_file)
        model.load_state_dict(weights)
        return model

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        super()._save_pretrained(save_directory, **kwargs)
        model_card.write(self.config, save_directory)

    def ema_only(self) -> "FlowMatchingPolicy":
        """A copy that holds the averaged weights alone, as its own: what deployment needs, half the size."""
        config = copy.copy(self.config)
        config.use_ema = False
        policy = FlowMatchingPolicy(config)
        policy.net.load_state_dict((self.ema_net if self.config.use_ema else self.net).state_dict())
        policy.training_steps.copy_(self.training_steps)
        if self.config.variance == "learned":
            policy.log_variance.data.copy_(self.log_variance)
        return policy.eval()
