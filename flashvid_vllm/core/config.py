# SPDX-License-Identifier: MIT
"""The settings of FlashVID: one frozen dataclass, validated when built."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .methods import PEERS

Method = Literal[
    "flashvid", "ttm", "adts", "tstm",
    "evs", "vidcom2", "visionzip", "fastvid", "prunevid", "tome", "divprune",
    "vcast", "gleanvid", "adaptive", "uniform",
]  # fmt: skip
Selection = Literal["attention_diversity_event", "attention_diversity", "attention", "diversity"]
Matching = Literal["tree", "position"]
Backend = Literal["auto", "torch", "native", "triton"]
EncoderReuse = Literal["tokens", "frames"]

DEFAULT_RETENTION_RATIO = 0.25
MAX_INT = 2**31 - 1
AUTO = "auto"  # of encoder_ratio
ENCODER_SETTINGS = ("encoder_ratio", "encoder_reuse")
# Of what is dropped inside the LLM. The first is a request's too, the others shape the engine.
INNER_SETTINGS = ("inner", "inner_layer", "inner_ratio", "inner_depth")
FASTV = "fastv"  # the method that compresses nothing before the LLM, and drops inside it alone
FASTV_LAYER = 2  # its paper's K
# What FlashVID alone reads; the peers' constants are their papers'.
FLASHVID_SETTINGS = ("alpha", "merge_threshold", "segment_threshold", "min_segments", "selection", "matching",
                     "suppress_sinks")  # fmt: skip
# Methods that are settings of FlashVID, and what they set.
ABLATIONS: dict[str, dict[str, Any]] = {"ttm": {"matching": "position"}, "adts": {"alpha": 1.0}, "tstm": {"alpha": 0.0}}


@dataclass(frozen=True)
class FlashVidConfig:
    """How a video is compressed (FlashVID, arXiv 2602.08024, Sec. 3; ALGORITHM names in brackets).

    Every method keeps the same number of tokens. A setting that the method does not read or sets otherwise is
    refused unless it has its default: the constructor cannot tell whether a default was given.

    Args:
        retention_ratio: share of the video's visual tokens to keep, in (0, 1] [R].
            Neither this nor ``token_budget`` given: 0.25.
        token_budget: most visual tokens to keep of a video, whatever its length; >= 1.
        method: "flashvid"; an ablation of it, "ttm" (matching by position), "adts" (alpha 1) or "tstm" (alpha 0);
            or a peer, see ``flashvid_vllm.core.methods``; or "fastv", which keeps all tokens before the LLM and
            the ratio or budget of them from layer K on.
        alpha: share of the kept tokens that ADTS selects, in [0, 1]; TSTM merges the rest.
        merge_threshold: cosine similarity above which TSTM links a token to the
            previous frame [T_tau]; in [-1, 1].
        segment_threshold: cosine similarity of neighbouring frames below which a new
            segment starts [S_tau]; in [-1, 1].
        min_segments: least number of segments of a video (never more than frames); >= 1.
        selection: the weight of ADTS: received attention with or without event
            relevance, attention alone (top-K) or diversity alone.
        matching: "tree" links a token to the most similar one of the previous frame (TSTM),
            "position" to the one at the same position (TTM).
        suppress_sinks: whether ADTS takes off the attention that a place draws in every frame, beyond the median.
        backend: which implementation of the ops runs; an explicit one is used or raises.
        encoder_ratio: share of a video's patches that the vision encoder computes, in (0, 1], the others being
            copies in time; "auto": as few as leave little unexplained. Read before the encoder, whatever
            ``method``; ``compress`` itself does not.
        encoder_reuse: what is computed or copied, "tokens" each for itself, or whole "frames".
        inner: whether tokens are dropped a second time, inside the LLM. The ratio or budget is then the average over
            its layers: more tokens enter it, fewer leave layer K.
        inner_layer: layers that have all tokens that enter [K]; from the next on only those do that the prompt's last
            token attends to most in layer K.
        inner_ratio: share of a video's tokens in the LLM that is left from there on, in (0, 1] [r].
        inner_depth: layers of the LLM [L].

    Raises:
        ValueError: a value of the wrong type or out of range, both ``retention_ratio`` and ``token_budget``, or
            a setting that ``method`` does not read or sets to something else.
    """

    retention_ratio: float | None = None
    token_budget: int | None = None
    method: Method | Literal["fastv"] = "flashvid"
    alpha: float = 0.7
    merge_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    selection: Selection = "attention_diversity_event"
    matching: Matching = "tree"
    suppress_sinks: bool = False
    backend: Backend = "auto"
    encoder_ratio: float | Literal["auto"] = 1.0
    encoder_reuse: EncoderReuse = "tokens"
    inner: bool = False
    inner_layer: int | None = None
    inner_ratio: float | None = None
    inner_depth: int | None = None

    def __post_init__(self) -> None:
        if self.retention_ratio is not None and self.token_budget is not None:
            raise ValueError(
                f"retention_ratio={self.retention_ratio!r} and token_budget={self.token_budget!r} "
                "exclude each other; give one of them"
            )
        if self.token_budget is None:
            ratio = DEFAULT_RETENTION_RATIO if self.retention_ratio is None else self.retention_ratio
            self._set("retention_ratio", _real("retention_ratio", ratio, 0.0, 1.0, open_low=True))
        else:
            self._set("token_budget", _integer("token_budget", self.token_budget))
        check_method(self.method)
        self._set("alpha", _real("alpha", self.alpha, 0.0, 1.0))
        self._set("merge_threshold", _real("merge_threshold", self.merge_threshold, -1.0, 1.0))
        self._set("segment_threshold", _real("segment_threshold", self.segment_threshold, -1.0, 1.0))
        self._set("min_segments", _integer("min_segments", self.min_segments))
        _choice("selection", self.selection, get_args(Selection))
        _choice("matching", self.matching, get_args(Matching))
        if not isinstance(self.suppress_sinks, bool):
            raise ValueError(f"suppress_sinks must be true or false, got {shown(self.suppress_sinks)}")
        _choice("backend", self.backend, get_args(Backend))
        if not (isinstance(self.encoder_ratio, str) and self.encoder_ratio == AUTO):
            self._set("encoder_ratio", _real("encoder_ratio", self.encoder_ratio, 0.0, 1.0, True, f' or "{AUTO}"'))
        _choice("encoder_reuse", self.encoder_reuse, get_args(EncoderReuse))
        refuse_unread(
            {name: getattr(self, name) for name in FLASHVID_SETTINGS if not self._is_default(name)}, self.method
        )
        for name, value in ABLATIONS.get(self.method, {}).items():
            self._set(name, value)
        self._check_inner()

    def _check_inner(self) -> None:
        if not isinstance(self.inner, bool):
            raise ValueError(f"inner must be true or false, got {shown(self.inner)}")
        if self.method == FASTV:
            if self.inner_ratio is not None:
                raise ValueError(
                    f"inner_ratio={shown(self.inner_ratio)}: method={FASTV!r} keeps the retention_ratio or the "
                    "token_budget inside the LLM; leave it out"
                )
            self._set("inner", True)
            self._set("inner_layer", FASTV_LAYER if self.inner_layer is None else self.inner_layer)
        for name in ("inner_layer", "inner_depth"):
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name)))
        if self.inner_ratio is not None:
            self._set("inner_ratio", _real("inner_ratio", self.inner_ratio, 0.0, 1.0, open_low=True))
        given = [name for name in INNER_SETTINGS[1:] if getattr(self, name) is not None]
        if given and not self.inner:
            raise ValueError(f"{given[0]}={getattr(self, given[0])} is read where inner is true; set that too")
        if self.inner_layer and self.inner_depth and self.inner_layer >= self.inner_depth:
            raise ValueError(
                f"inner_layer={self.inner_layer} must be below the language model's {self.inner_depth} layers"
            )

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == getattr(type(self), name))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def needs_attention(self) -> bool:
        """Whether the method reads the received attention; FlashVID's does in ADTS, unless by diversity alone."""
        if self.method in PEERS:
            return PEERS[self.method].reads_attention
        return self.method != FASTV and self.alpha > 0 and self.selection != "diversity"

    @property
    def encodes_less(self) -> bool:
        """Whether the vision encoder leaves out any part of a video."""
        return self.encoder_ratio != 1

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name; ``FlashVidConfig(**d)`` gives the same object back."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "FlashVidConfig":
        """Build from a mapping; an unknown key raises ValueError that suggests the nearest."""
        refuse_unknown(settings, CONFIG_KEYS, "setting")
        return cls(**settings)


CONFIG_KEYS = tuple(field.name for field in fields(FlashVidConfig))
_SHOWN = 100  # characters of a value that a message repeats


def check_method(method: Any) -> None:
    """Raise ValueError unless ``method`` is one of ``Method``."""
    _choice("method", method, (*get_args(Method), FASTV))


def is_other(method: str) -> bool:
    """Whether ``method`` is none of FlashVID's."""
    return method in PEERS or method == FASTV


def is_set_by(method: str, name: str) -> bool:
    """Whether ``method`` does not read the setting ``name``, or sets it itself."""
    return name in (FLASHVID_SETTINGS if is_other(method) else ABLATIONS.get(method, {}))


def refuse_unread(given: Mapping[str, Any], method: str) -> None:
    """Raise ValueError for the first of ``given`` that ``method`` does not read, or sets to something else."""
    for name, value in given.items():
        if not is_set_by(method, name):
            continue
        if is_other(method):
            raise ValueError(
                f"{name}={shown(value)} is a setting of FlashVID, which method={method!r} does not read; leave it out"
            )
        if value != ABLATIONS[method][name]:
            raise ValueError(
                f"method={method!r} means {name}={ABLATIONS[method][name]!r} and excludes {name}={shown(value)}; "
                "leave one of them out"
            )


def shown(value: Any) -> str:
    """``value`` as a message shows it: a client may send a megabyte."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints; deeper than it can follow
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refuse_unknown(given: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Raise ValueError for the first of ``given`` that is not ``known``, naming the nearest."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:_SHOWN], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown FlashVID {what} {shown(key)}; {hint}")


def _real(name: str, value: Any, low: float, high: float, open_low: bool = False, or_else: str = "") -> float:
    expected = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]{or_else}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be {expected}, got {shown(value)} ({type(value).__name__})")
    number: Any = value  # compared before it is made a float, which not every int can be
    if not low <= number <= high or (open_low and number == low):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return float(number)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number >= 1, got {shown(value)} ({type(value).__name__})")
    if not 1 <= int(value) <= MAX_INT:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_INT}, got {shown(value)}")
    return int(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
