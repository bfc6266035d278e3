"""JAX with eight CPU devices and float64, set before a device is used."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
