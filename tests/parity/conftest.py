"""Eight CPU devices and float64 for JAX, before anything touches a device."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
