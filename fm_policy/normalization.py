"""The statistics that a training normalises by: its base's, and of what never changed ones that can be divided by."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lerobot.configs import NormalizationMode
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline

if TYPE_CHECKING:
    from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
    from fm_policy.configuration_fm_ft import FlowMatchingConfig

    type Config = FlowMatchingConfig | DiffusionEmaConfig

# A range below it, in units of the number or of 1, is rounding.
TINY = 1e-6

Statistics = Mapping[str, Mapping[str, Any]]

STATISTICS = {
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.IDENTITY: (),
}


def prepare(config: "Config", meta: Any) -> None:
    """Widen what never changes in a data set that LeRobot's trainer hands in, and tell of it."""
    if constant := widen_constants(config, getattr(meta, "stats", None) or {}):
        logging.warning(f"The same in all of the data, so that nothing is learned from it: {', '.join(constant)}")


def widen_constants(config: "Config", stats: dict[str, dict[str, Any]], owner: str = "the data set") -> list[str]:
    """Give every observed number that is the same in all of the data a range, in place.

    LeRobot divides by the range, or by 1e-8 where there is none: a joint that stood at .3 throughout and is at .301
    on the robot would become 200 000. The number itself is still normalised to what it was, -1 or 0.

    Args:
        config: Of the policy, with its features.
        stats: Of the data set, feature -> statistic -> values; LeRobot makes the processors of it.
        owner: Whose they are, for what is refused.

    Returns:
        The numbers, as `"observation.state[3]"`.

    Raises:
        ValueError: If it lacks a statistic that the policy normalises by.
    """
    constant = []
    for name, feature in (config.input_features or {}).items():
        ends = STATISTICS[config.normalization_mapping[feature.type.value]]
        if name not in stats or not ends:
            continue
        low, high = (np.asarray(_statistic(stats, name, end, owner), dtype=np.float64) for end in ends)
        room = np.maximum(1.0, abs(low))
        width, wide = (high, room) if ends == ("mean", "std") else (high - low, low + 2 * room)
        flat = width < TINY * room
        if flat.any():
            stats[name] = {**stats[name], ends[1]: np.where(flat, wide, high).astype(np.float32)}
            constant += [f"{name}[{i}]" for i in np.flatnonzero(flat)]
    return constant


def keep_statistics(config: "Config", folder: Path) -> None:
    """See that a training normalises as its base did: LeRobot would take the data set's statistics, without a word.

    Where `config.keep_statistics` is set, the base's statistics take the place of the data set's, in the description
    of the data set that LeRobot's trainer hands in and makes its processors of.

    Raises:
        ValueError: If they differ and are not to be kept, naming both, or if one is missing.
    """
    meta = getattr(config, "_runtime_dataset_meta", None)
    if meta is None:
        return
    stored = _stored_statistics(str(config.pretrained_path or folder))
    owner = f"the preprocessor of {folder}"
    widen_constants(config, stored, owner)
    differing = _differing_statistics(config, stored, meta.stats, owner)
    if differing and not config.keep_statistics:
        lines = [f"{what}: {there} there, {here} here" for what, (there, here) in differing.items()]
        raise ValueError(
            f"the data set in {meta.root} has other statistics than {folder}, whose weights belong to its own:\n  "
            + "\n  ".join(lines)
            + "\nTake that policy's data set, or keep its normalisation by --policy.keep_statistics=true"
        )
    for what in differing:
        name, statistic = what.rsplit(" ", 1)
        meta.stats[name] = {**meta.stats[name], statistic: np.asarray(stored[name][statistic])}
        logging.info(f"Normalisation: {what} stays that of {folder}")


def _stored_statistics(source: str) -> dict[str, dict[str, Any]]:
    from fm_policy import processor_fm_ft  # noqa: F401  (registers the steps)

    pipeline = PolicyProcessorPipeline.from_pretrained(
        source, config_filename="policy_preprocessor.json", overrides={"device_processor": {"device": "cpu"}}
    )
    normalizer = next(step for step in pipeline.steps if isinstance(step, NormalizerProcessorStep))
    return {name: dict(values) for name, values in (normalizer.stats or {}).items()}


def _differing_statistics(
    config: "Config", stored: Statistics, given: Statistics, owner: str
) -> dict[str, tuple[list, list]]:
    """`"<feature> <statistic>"` to the base's value and the data set's, where they differ."""
    differing = {}
    for name, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        for statistic in STATISTICS[config.normalization_mapping[feature.type.value]]:
            there = torch.as_tensor(_statistic(stored, name, statistic, owner)).double()
            here = torch.as_tensor(_statistic(given, name, statistic, "the data set")).double()
            if here.numel() != there.numel():
                raise ValueError(f"'{name}' has {here.numel()} numbers in the data set, {there.numel()} in {owner}")
            here = here.reshape(there.shape)
            if not torch.allclose(here, there, rtol=1e-4, atol=1e-6):
                differing[f"{name} {statistic}"] = there.flatten().tolist(), here.flatten().tolist()
    return differing


def _statistic(stats: Statistics, name: str, statistic: str, owner: str) -> Any:
    """One statistic of one feature; LeRobot would leave a feature without statistics as it is, without a word."""
    if name not in stats:
        raise ValueError(
            f"{owner} has no statistics of {name!r}, only of {sorted(stats)} (--rename_map renames what a policy "
            "sees when it acts, and no statistics of a training)"
        )
    if statistic not in stats[name]:
        raise ValueError(f"{owner} has no {statistic!r} of {name!r}, by which it is normalised, only {[*stats[name]]}")
    return stats[name][statistic]
