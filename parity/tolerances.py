"""Allowed differences, all of them. They are never loosened: see docs/parity.md."""

# Allowed differences, all of them. They are never loosened: see docs/parity.md.
FLOAT64 = 1e-12


FLOAT32_LOGITS = 2e-6


RATIO = 2.0
"""Neither framework may be further from float64 than this many times the other."""


ROUNDING = 2.0**-29
"""A rounding of float64 as a share of one of float32: 2^-53 / 2^-24."""
EPS = 1e-6
"""AdamW's epsilon, above the rounding of a gradient's element. With 1e-8 an element whose gradient
is nearly zero moves by the learning rate in a direction that rounding decides, and ten such
elements of a trained model are most of the distance of its parameters from float64."""


TINY = 2.0**-24
"""Half a unit in float32's last place: below it, which of two roundings is nearer is chance."""
