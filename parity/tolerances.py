"""All allowed differences. They are never loosened: see docs/parity.md."""

FLOAT64 = 1e-12
"""Relative, in float64; of curves, at every step."""

FLOAT32_LOGITS = 2e-6
"""Relative, of float32 logits from float64."""

RATIO = 2.0
"""A framework's distance from float64 is at most this multiple of the other framework's, and two
float32 curves differ by at most this multiple of their noise floor."""

CURVE_FLOAT32 = 2e-5
"""Of the demo: losses in nats after a change of framework, from the baseline; bits per byte of both
frameworks, relative."""

ROUNDING = 2.0**-29
"""The ratio of float64's rounding to float32's: 2^-53 / 2^-24."""

EPS = 1e-6
"""AdamW's epsilon, above the rounding error of a gradient's element. With 1e-8, an element whose
gradient is nearly zero moves by the learning rate in a direction that rounding decides, and ten
such elements of a trained model account for most of its parameters' distance from float64."""

TINY = 2.0**-24
"""Half a unit in float32's last place. Of two smaller distances, which is larger is chance."""
