"""One training on the device: stopped at any time, it goes on to the same weights, bit for bit on the same machine.

A folder holds `state.safetensors` while it trains (weights, their average, Adam's moments, the step), `log.jsonl`, and
at the end `average.safetensors`, which is what is measured and brought home. What is drawn in a step depends on seed
and step alone, so that these two numbers are the state of the generators.
"""

import copy
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fm_policy.accelerator import diffusion
from fm_policy.accelerator.data import ACTION, IS_PAD, Windows
from fm_policy.accelerator.net import make_net, settings
from fm_policy.accelerator.plan import Plan
from fm_policy.ema import ema_decay, ema_update
from fm_policy.files import part, read_tensors, write_tensors
from fm_policy.flow.coupling import independent, nearest, reflow
from fm_policy.flow.losses import HUBER_SCALE, cfm_loss, masked_mse, pseudo_huber
from fm_policy.flow.solvers import call_times
from fm_policy.net import FlowMatchingNet
from fm_policy.repeatable import HELD_OUT_KEY, repeatable
from fm_policy.slices import SAVE_SECONDS, Clock, TimeIsUpError, check_settings

STATE_FILE, AVERAGE_FILE, LOG_FILE = "state.safetensors", "average.safetensors", "log.jsonl"
START_KEY = 0  # what is drawn before the first step
LOG_STEPS = 100
CLIP = 10.0  # of the gradient's norm, as in the policy's optimiser


def prepare(name: str) -> torch.device:
    """A device; a GPU with kernels that repeat themselves, and TF32 for all products, as cuDNN has it for convolutions.

    Raises:
        ValueError: If there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} needs a GPU, and torch sees none: --device cpu")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # none is read here
        torch.set_float32_matmul_precision("high")
    return device


def loss_of(plan: Plan, net: FlowMatchingNet, base: FlowMatchingNet | None, batch: dict[str, Tensor]) -> Tensor:
    """The method's loss of a batch: eq. (3), eq. (6), or the error of the predicted noise.

    Args:
        plan: The method, and how it pairs and solves.
        net: In training.
        base: What `reflow` takes its pairs from.
        batch: See `Windows.at`.
    """
    with torch.autocast(batch[ACTION].device.type, torch.bfloat16, enabled=plan.bf16):
        x1, is_pad = batch[ACTION], batch[IS_PAD]
        if plan.method == "ddpm":
            return diffusion.loss(net.velocity, diffusion.features(net.encoder, batch), x1, is_pad)
        o = net.encoder(batch)
        if plan.method != "ft":
            return cfm_loss(net.velocity.bind(o), independent(x1), x1, is_pad)
        if plan.policy["coupling"] == "reflow":
            assert base is not None
            x0, ends = _taught(plan, base, batch)
            return pseudo_huber(net.chunk(settings(plan.policy), x0, o), ends, HUBER_SCALE)
        return masked_mse(net.chunk(settings(plan.policy), _noise(plan, net, batch, o), o), x1, is_pad)


@torch.no_grad()
def _taught(plan: Plan, base: FlowMatchingNet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    steps = plan.policy["reflow_steps"]
    with torch.autocast(batch[ACTION].device.type, enabled=False):  # the roundings of a teacher would be learned
        v = base.velocity.bind(base.encoder(batch), call_times("euler", steps))  # told the times, it compiles once
        return reflow(batch[ACTION], v, steps, scale=plan.policy["noise_scale"])


def _noise(plan: Plan, net: FlowMatchingNet, batch: dict[str, Tensor], o: Tensor) -> Tensor:
    scale = plan.policy["noise_scale"]
    if plan.policy["coupling"] == "independent":
        return independent(batch[ACTION], scale=scale)
    k, steps = plan.policy["nearest_k"], plan.policy["nearest_steps"] or plan.policy["num_solver_steps"]
    coarse = settings(plan.policy | {"num_solver_steps": steps})
    solve = partial(net.chunk, coarse, o=o.detach().repeat(k, 1))
    return nearest(batch[ACTION], k, solve, batch[IS_PAD], scale=scale)


def flops(plan: Plan, windows: Windows, base: FlowMatchingNet | None = None) -> int:
    """Floating-point operations of a window in a training step, forwards and backwards."""
    net, device = make_net(plan.policy), windows.train.device
    counter = FlopCounterMode(display=False)
    with counter, repeatable(HELD_OUT_KEY, device):
        loss_of(plan, net.to(device), base, windows.draw(2)).backward()
    return counter.get_total_flops() // 2


class Trainer:
    """A net, its average and its optimiser."""

    def __init__(
        self, plan: Plan, windows: Windows, folder: Path, base: FlowMatchingNet | None, device: torch.device
    ) -> None:
        """Begin, or go on from where the folder stands.

        Args:
            plan: What to train.
            windows: The data.
            folder: For state, log and average.
            base: What the plan starts from, if it tunes, with gradients off.
            device: Where to compute.

        Raises:
            ValueError: If the folder is another training's.
        """
        self.plan, self.windows, self.folder, self.device = plan, windows, folder, device
        with repeatable((plan.seed, START_KEY), device):
            self.net = make_net(plan.policy).to(device)
        if base is not None:
            self.net.load_state_dict(base.state_dict())
        self.base = None if base is None else base.to(device)
        self.average = copy.deepcopy(self.net).requires_grad_(False).eval()
        policy = plan.policy
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=plan.lr,
            betas=tuple(policy["optimizer_betas"]),
            weight_decay=policy["optimizer_weight_decay"],
            fused=True,
        )
        self.step = 0
        self.losses = torch.zeros((), device=device)  # their sum since the last line of the log
        self.data = {"frames": len(windows.frames), "statistics": windows.statistics}
        if (folder / AVERAGE_FILE).is_file():
            self._load(folder / AVERAGE_FILE)
        elif (folder / STATE_FILE).is_file():
            self._load(folder / STATE_FILE)
        if plan.compile:
            for net in (self.net, self.base):
                if net is not None:
                    net.encoder.compile()
                    net.velocity.compile()

    def run(self, clock: Clock) -> None:
        """Train to the end.

        Args:
            clock: When to stop.

        Raises:
            TimeIsUpError: If the clock stopped it; it is saved.
        """
        if (self.folder / AVERAGE_FILE).is_file():
            return
        self._cut_log()
        saved = time.monotonic()
        with tqdm(total=self.plan.steps, initial=self.step, desc=self.plan.name, unit="step", mininterval=5) as bar:
            while self.step < self.plan.steps:
                if clock.is_up() or time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if clock.is_up():
                    raise TimeIsUpError
                self.learn()
                bar.update()
                if self.step % LOG_STEPS == 0 or self.step == self.plan.steps:
                    self._log()
        self._write(AVERAGE_FILE, {})
        (self.folder / STATE_FILE).unlink(missing_ok=True)

    def learn(self) -> None:
        """One step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.step += 1
        with repeatable((self.plan.seed, self.step), self.device):
            loss = loss_of(self.plan, self.net, self.base, self.windows.draw(self.plan.batch))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimizer.step()
        self.losses += loss.detach()
        policy = self.plan.policy
        ema_update(self.average, self.net, ema_decay(self.step, policy["ema_power"], policy["ema_max_decay"]))

    @torch.no_grad()
    def held_out(self) -> float | None:
        """The average's loss on the same windows and draws every time, or None where nothing is held out."""
        rows = self.windows.held_out
        if not len(rows):
            return None
        with repeatable(HELD_OUT_KEY, self.device):
            chosen = rows[torch.randint(len(rows), (self.plan.batch,)).to(rows.device)]
            return float(loss_of(self.plan, self.average, self.base, self.windows.at(chosen)))

    def save(self) -> None:
        """Write the state, whole or not at all."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        for n, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{n}.{name}": value for name, value in state.items()}
        self._write(STATE_FILE, tensors | {"losses": self.losses})

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        average = {f"average.{name}": value for name, value in self.average.state_dict().items()}
        about = {"plan": vars(self.plan), "data": self.data, "step": self.step}
        write_tensors(self.folder / name, tensors | average, about)

    def _load(self, file: Path) -> None:
        tensors, about = read_tensors(file)
        check_settings(file, about["plan"] | about["data"], vars(self.plan) | self.data)
        self.step = about["step"]
        self.average.load_state_dict(part(tensors, "average."))
        if file.name == AVERAGE_FILE:
            return
        self.net.load_state_dict(part(tensors, "net."))
        self.losses.copy_(tensors["losses"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part(tensors, "adam.").items():
            n, _, key = name.partition(".")
            state.setdefault(int(n), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _log(self) -> None:
        since = self.step % LOG_STEPS or LOG_STEPS
        mean = float(self.losses) / since
        self.losses.zero_()
        line = {"step": self.step, "loss": mean, "held_out": self.held_out(), "rate": self.plan.rate(self.step - 1)}
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _cut_log(self) -> None:
        """Drop the lines of steps that were lost by a kill and will be taken again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / LOG_FILE
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        log.write_text("".join(kept), encoding="utf-8")


def finished(folder: Path, plan: Plan) -> FlowMatchingNet:
    """The averaged net of a finished training, frozen.

    Raises:
        ValueError: If it is not finished, or of another shape or seed than the plan's.
    """
    file = folder / AVERAGE_FILE
    if not file.is_file():
        raise ValueError(f"no finished {plan.method} in {folder}: train it to its end first, --method {plan.method}")
    tensors, about = read_tensors(file)
    wanted: dict[str, Any] = {"policy": plan.policy, "seed": plan.seed}
    check_settings(file, {name: about["plan"][name] for name in wanted}, wanted)
    net = make_net(plan.policy)
    net.load_state_dict(part(tensors, "average."))
    return net.requires_grad_(False).eval()
