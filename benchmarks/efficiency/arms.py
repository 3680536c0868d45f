"""What is compared: every arm a few overrides and a grid of the same number of tuning trials."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

RATES = (0.006, 0.012)
PLAIN_RATES = (0.003, 0.006, 0.012, 0.024)  # of arms that have nothing else to tune
TARGET_SHARE = "mix.target_share"  # not a configuration key: the oracle's weights follow from it
Settings = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class Arm:
    """One way of deciding what is trained on.

    Attributes:
      settings: dotted configuration keys that are the arm.
      ours: it is the method; controls, oracles and rivals are not.
      rates: learning rates of the grid.
      knob: the key of the arm's own that is tuned with the rate, and its values.
      settings_of: another arm whose tuned settings it takes, so that it is never tuned for itself.
    """

    settings: Settings = field(default_factory=dict)
    ours: bool = False
    rates: tuple[float, ...] = RATES
    knob: str | None = None
    values: tuple[Any, ...] = (None,)
    settings_of: str | None = None

    def trials(self) -> list[Settings]:
        """Every point of the grid; none for an arm that takes another's."""
        if self.settings_of is not None:
            return []
        knobs = [{self.knob: value} if self.knob else {} for value in self.values]
        return [{"optimizer.learning_rate": rate} | knob for rate, knob in itertools.product(self.rates, knobs)]


def _each_step(**more: Any) -> Settings:
    """Choose from twice the batch at every step, greedily."""
    return {"selection.method": "opus", "selection.ratio": 0.5, "selection.temperature": 0.0} | _dotted(more)


def _dotted(settings: Mapping[str, Any]) -> Settings:
    return {name.replace("__", "."): value for name, value in settings.items()}


_EMA: dict[str, Any] = {"knob": "proxy.ema", "values": (0.0, 0.9)}
_RATIO: dict[str, Any] = {"knob": "selection.ratio", "values": (0.5, 0.25)}
_NONE: Settings = {"selection.method": "none"}
_FEEDBACK: Settings = {
    "selection.method": "opus",
    "selection.temperature": float("inf"),  # score only
    "selection.ratio": 0.5,
    "selection.select_every": 10,
    "selection.warm_start_steps": 5,
    "feedback.enabled": True,
    "feedback.window_steps": 10,
}

ARMS: dict[str, Arm] = {
    "random": Arm(_NONE, rates=PLAIN_RATES),
    "topk_raw": Arm(_each_step(selection__direction="identity"), **_EMA),
    "topk_p": Arm(_each_step(), ours=True, **_EMA),
    "boltzmann": Arm(_each_step(selection__temperature=0.5), ours=True, **_EMA),
    "lambda": Arm(_each_step(selection__redundancy=1.0, selection__redundancy_rounds=2), ours=True, **_EMA),
    "entropy": Arm(_each_step(), ours=True, knob="selection.entropy", values=(0.7, 0.9)),
    "high_loss": Arm(_each_step(selection__method="high_loss"), **_RATIO),
    "mid_loss": Arm(_each_step(selection__method="mid_loss"), **_RATIO),
    "greats": Arm(_each_step(selection__method="greats"), **_EMA),
    "paper": Arm(_each_step(selection__method="paper", selection__temperature=0.9), **_EMA),
    "dsir": Arm(_NONE | {"plan.importance": "dsir"}, knob="plan.keep", values=(0.1, 0.3)),
    "odm": Arm(
        _NONE | {"feedback.enabled": True, "feedback.signal": "odm", "feedback.groups": ["domain"]},
        knob="feedback.window_steps",
        values=(5, 20),
    ),
    "random_proxy_rows": Arm(_NONE, knob="plan.proxy_rows_share", values=(0.1, 0.3)),
    "feedback": Arm(_FEEDBACK, ours=True, knob="feedback.temperature", values=(0.1, 0.2)),
    "feedback_dsir": Arm(  # begins with the documents that DSIR keeps, instead of with all
        _FEEDBACK | {"plan.importance": "dsir", "feedback.temperature": 0.2},
        ours=True,
        knob="plan.keep",
        values=(0.1, 0.3),
    ),
    "feedback_shuffled": Arm(_FEEDBACK | {"feedback.shuffle": True}, settings_of="feedback"),
    "feedback_dsir_shuffled": Arm(
        _FEEDBACK | {"plan.importance": "dsir", "feedback.temperature": 0.2, "feedback.shuffle": True},
        settings_of="feedback_dsir",
    ),
    "feedback_opus": Arm(
        _FEEDBACK | {"selection.select_every": 5, "selection.temperature": 0.25},
        ours=True,
        knob="feedback.temperature",
        values=(0.1, 0.2),
    ),
    "oracle": Arm(_NONE, knob=TARGET_SHARE, values=(0.5, 0.8)),
}

REFERENCE = "random"
CLEAN_ARMS = (  # what the pool without noise is about: is it only noise that is avoided? Variants of one step stay out.
    "random", "topk_p", "paper", "dsir", "odm", "random_proxy_rows", "feedback", "feedback_dsir", "feedback_shuffled",
    "feedback_dsir_shuffled", "feedback_opus", "oracle",
)  # fmt: skip
METHOD_ARMS = [name for name, arm in ARMS.items() if arm.ours]
TRIALS = 4  # of every arm that is tuned


def described(names: list[str] | None = None) -> dict[str, Any]:
    """The arms as plain values that JSON keeps: what a frozen choice was made among."""
    plain = {name: asdict(ARMS[name]) for name in names or ARMS}
    return json.loads(json.dumps(plain).replace("Infinity", '"inf"'))
