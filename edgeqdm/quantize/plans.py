"""Plans made by rule: which precision suits which part of a network."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edgeqdm.errors import InputError
from edgeqdm.ir.model import LayerInfo, LayerKind, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, TABLE, W8A8, ActivationPolicy, Precision

ENDS_REASON = {
    "input": "first layer, its rounding error reaches every other layer",
    "output": "last layer, its rounding error reaches the sample undamped",
}
FINE_BITS = 8
FINE_REASON = "finest resolution of the body, few weights used at many positions"


def default_plan(
    info: ModelInfo,
    target: str,
    n_steps: int,
    *,
    body: Precision = W8A8,
    embedding: Precision = FP32,
    tables: Collection[str] = (),
    fine: Collection[str] = (),
    activation: ActivationPolicy | None = None,
) -> DeploymentPlan:
    """One precision for the body, float for the ends, and a choice for the embeddings.

    Args:
        info: of the model.
        target: name of a backend.
        n_steps: S.
        body: precision of the layers the sample passes through; a convolution gets it without
            groups and run-time scales, which no convolution kernel has.
        embedding: precision of layers that depend on timestep and conditioning only.
        tables: embedding layers that are looked up instead of computed.
        fine: body layers that keep 8-bit weights where `body` has fewer.
        activation: policy of the activations whose precision allows it; default what that implies.
    """
    layers = tuple(
        _assignment(x, body, embedding, tables, x.name in fine, activation) for x in info.layers
    )
    phase = Phase(start=0, stop=n_steps, layers=layers)
    return DeploymentPlan(target=target, model=info.fingerprint, n_steps=n_steps, phases=(phase,))


def float_plan(info: ModelInfo, target: str, n_steps: int) -> DeploymentPlan:
    """Every layer in float: the baseline that a quantized package is measured against."""
    layers = tuple(
        LayerAssignment(layer=x.name, precision=FP32, reason="fp32: float baseline")
        for x in info.layers
    )
    phase = Phase(start=0, stop=n_steps, layers=layers)
    return DeploymentPlan(target=target, model=info.fingerprint, n_steps=n_steps, phases=(phase,))


def with_activation_bits(plan: DeploymentPlan, bits: Sequence[int]) -> DeploymentPlan:
    """The plan with the activation bits of its integer layers chosen per step.

    Args:
        plan: of one phase.
        bits: activation bits of every step, [S], from `activation_bits_by_step`; every change of
            bits begins a phase.

    Raises:
        InputError: if the plan has several phases or another number of steps.

    Source: PTQD, section 4.3: weights keep their bits, one stored copy serves all steps.
    """
    if len(plan.phases) != 1 or len(bits) != plan.n_steps:
        raise InputError(
            "EQ-3209",
            f"bits of {len(bits)} steps for a plan of {plan.n_steps} steps and "
            f"{len(plan.phases)} phases",
            path="plan",
            hint="give one number per step and a plan of one phase",
        )
    starts = [i for i in range(len(bits)) if i == 0 or bits[i] != bits[i - 1]]
    phases = tuple(
        Phase(
            start=start,
            stop=stop,
            layers=tuple(_with_bits(a, bits[start]) for a in plan.phases[0].layers),
        )
        for start, stop in zip(starts, [*starts[1:], len(bits)], strict=True)
    )
    return plan.model_copy(update={"phases": phases})


def _with_bits(assignment: LayerAssignment, bits: int) -> LayerAssignment:
    precision = assignment.precision
    if not precision.integer or precision.activation_bits == bits:
        return assignment
    chosen = _coded(precision.weight_bits, precision.group_size, bits, precision.dynamic)
    reason = f"{chosen}: {bits}-bit activations by the diffusion's noise at these steps"
    return assignment.model_copy(update={"precision": chosen, "reason": reason})


def _assignment(
    layer: LayerInfo,
    body: Precision,
    embedding: Precision,
    tables: Collection[str],
    fine: bool,
    activation: ActivationPolicy | None,
) -> LayerAssignment:
    if layer.role == "body":
        wanted = _widened(body) if fine else body
        chosen = _for_kind(layer.kind, wanted)
        reason = f"{chosen}: {'body of the network' if wanted == body else FINE_REASON}"
        return _of_policy(layer.name, chosen, activation, reason)
    if layer.role == "embedding":
        chosen = TABLE if layer.name in tables else _for_kind(layer.kind, embedding)
        reason = f"{chosen}: depends on timestep and conditioning only"
        return _of_policy(layer.name, chosen, activation, reason)
    reason = f"fp32: {ENDS_REASON[layer.role]}"
    return LayerAssignment(layer=layer.name, precision=FP32, reason=reason)


def _of_policy(
    layer: str, precision: Precision, activation: ActivationPolicy | None, reason: str
) -> LayerAssignment:
    policy = activation if activation in precision.policies else None
    return LayerAssignment(layer=layer, precision=precision, activation=policy, reason=reason)


def _widened(precision: Precision) -> Precision:
    if not precision.coded or precision.weight_bits >= FINE_BITS:
        return precision
    return _coded(FINE_BITS, precision.group_size, precision.activation_bits, precision.dynamic)


def _for_kind(kind: LayerKind, precision: Precision) -> Precision:
    if kind is LayerKind.LINEAR or not precision.coded:
        return precision
    return _coded(precision.weight_bits, 0, precision.activation_bits, False)


def _coded(weight_bits: int, group_size: int, activation_bits: int, dynamic: bool) -> Precision:
    group = f"g{group_size}" if group_size else ""
    activation = f"a{activation_bits}" if activation_bits < 32 else ""
    return Precision(f"w{weight_bits}{group}{activation}{'dyn' if dynamic else ''}")
