"""Builds the loss that is a weighted sum of other losses, such as mio+0.1*sft."""

import dataclasses
import inspect


def weighted_sum(weights: dict[str, float], losses: list):
    """Returns the `mio.Loss` that is the sum of weight times loss. `weights` maps the names of the
    losses, in their order, to weights. The terms share beta, and each takes its own options."""
    terms = list(zip(weights.values(), losses))

    def total(chosen, rejected, **options):
        """chosen, rejected: mio.Answers of B pairs -> losses (B,)"""
        return sum(w * x.function(chosen, rejected, **x.own(options)) for w, x in terms)

    parameters = {k: p for x in losses for k, p in inspect.signature(x.function).parameters.items()}
    total.__signature__ = inspect.Signature(list(parameters.values()))
    total.__doc__ = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    return dataclasses.replace(
        losses[0],
        function=total,
        uses=" and ".join(x for x in ("sums", "means") if any(x in loss.uses for loss in losses)),
        beta=next((x.beta for x in losses if x.uses_beta), 1.0),
        initial_loss=lambda **settings: sum(w * x.loss_at_reference(**settings) for w, x in terms),
        source="; ".join(x.source for x in losses),
        needs_reference=any(x.needs_reference for x in losses),
        uses_beta=any(x.uses_beta for x in losses),
        answers="both" if any(x.answers == "both" for x in losses) else "chosen",
    )
