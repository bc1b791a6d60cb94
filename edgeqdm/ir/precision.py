"""The precisions a layer can be given, and how its activations get their scale."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_CODED = re.compile(r"w([468])(?:g([1-9][0-9]*))?(?:a([48])(dyn)?)?")
GROUP_SIZES = range(16, 257)


class ActivationPolicy(StrEnum):
    """Where the scale of an activation tensor comes from; a tensor has exactly one.

    `static`: one constant for all steps. `temporal`: a table over the steps. `dynamic_token`: from
    the values of each token at run time. `dynamic_token_group`: from the values of each token and
    group of input channels. `float`: the activation is not quantized.
    """

    STATIC = "static"
    TEMPORAL = "temporal"
    DYNAMIC_TOKEN = "dynamic_token"
    DYNAMIC_TOKEN_GROUP = "dynamic_token_group"
    FLOAT = "float"


class Precision(str):
    """How one layer is stored and computed.

    `w8a8`: 8-bit weights per output channel, 8-bit activations per tensor, integer kernel; bits of
    weights are 4, 6 or 8, of activations 4 or 8.
    `w4g64a8`: one weight scale and zero_point per 64 input channels.
    `w8a8dyn`, `w4g64a8dyn`: activation scales from the values at run time, per token or per token
    and group.
    `w8`, `w4g128`: only weights are coded, activations stay in float.
    `fp16`: weights stored in 16 bits. `fp32`: left as it is.
    `table`: not computed at all: its output depends on timestep and label only and is looked up.

    Raises:
        ValueError: if the text is none of these.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Precision:
        if text not in _WHOLE:
            match = _CODED.fullmatch(text)
            if match is None:
                raise ValueError(
                    f"{text!r} is no precision; examples: w8a8, w4g64a8, w8a8dyn, w4g128, fp32"
                )
            if match[2] is not None and int(match[2]) not in GROUP_SIZES:
                raise ValueError(f"{text!r}: a group has 16 to 256 input channels")
        return super().__new__(cls, text)

    def _field(self, number: int) -> str | None:
        match = _CODED.fullmatch(self)
        return None if match is None else match[number]

    @property
    def coded(self) -> bool:
        """Whether weights are stored as integer codes."""
        return self not in _WHOLE

    @property
    def weight_bits(self) -> int:
        return _WHOLE[self] if self in _WHOLE else int(self._field(1) or 0)

    @property
    def group_size(self) -> int:
        """Input channels that share a weight scale; 0 is all of them."""
        return int(self._field(2) or 0)

    @property
    def activation_bits(self) -> int:
        """4 or 8; 32 where activations stay in float."""
        return int(self._field(3) or 32)

    @property
    def dynamic(self) -> bool:
        return self._field(4) is not None

    @property
    def integer(self) -> bool:
        """Whether weights and activations are both integers, so that an integer kernel runs."""
        return self.activation_bits < 32

    @property
    def policies(self) -> tuple[ActivationPolicy, ...]:
        """Activation policies this precision allows; the first is the default."""
        if not self.integer:
            return (ActivationPolicy.FLOAT,)
        if self.dynamic and self.group_size:
            return (ActivationPolicy.DYNAMIC_TOKEN_GROUP,)
        if self.dynamic:
            return (ActivationPolicy.DYNAMIC_TOKEN,)
        return (ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


_WHOLE = {"fp32": 32, "fp16": 16, "table": 0}
FP32 = Precision("fp32")
FP16 = Precision("fp16")
TABLE = Precision("table")
W8A8 = Precision("w8a8")
