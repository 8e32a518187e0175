"""The linear map of all models: flax's, with the kernel's gradient written as [in, out]."""

import functools

import jax
from flax import nnx


@jax.custom_vjp
def product(x, kernel):
  """Multiplies float[..., D] by a kernel [D, O] of its dtype, giving [..., O].

  JAX's own rule computes the kernel's gradient as [O, D] and transposes it, which XLA does not
  undo on CPUs: large products write a second copy there, and the optimizer reads across its lines.
  """
  return x @ kernel


def _forward(x, kernel):
  return product(x, kernel), (x, kernel)


def _backward(residuals, grad):
  x, kernel = residuals
  rows = tuple(range(x.ndim - 1))
  by_kernel = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())))
  return grad @ kernel.T, by_kernel


product.defvjp(_forward, _backward)


def _dot_general(x, kernel, dimensions, **options):
  """Is what nnx.Linear calls to contract `x` with the first axis of the kernel."""
  del dimensions
  if any(option is not None for option in options.values()):
    raise TypeError(f"a Linear has no choice of {', '.join(options)}")
  return product(x, kernel)


Linear = functools.partial(nnx.Linear, dot_general=_dot_general)
