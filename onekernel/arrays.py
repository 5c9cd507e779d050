"""Arrays while a program is taken apart: how the values between two JAX primitives are held.

- a NumPy array: known now, the same for all worlds;
- `Scalars`: each element is a node of the graph; reshaping, slicing and the like only rearrange node
  numbers and cost the kernel nothing;
- `Memory`: a view (offset and strides, as NumPy's) of a buffer, for arrays too large to be taken apart;
- `Keys`: a PRNG key array, as its words, each one of the above with the keys' shape.
"""

import dataclasses
import math

import numpy as np

from onekernel.graph import KINDS


@dataclasses.dataclass
class Scalars:
    ids: np.ndarray  # numbers of nodes
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ids.shape


@dataclasses.dataclass
class Memory:
    """Element [i, j, ...] is the buffer's number `base + offset + i * strides[0] + j *
    strides[1] + ...`."""

    buffer: int
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    base: int = -1  # the node of an int32 that is added to the offset; -1 for none


@dataclasses.dataclass
class Keys:
    words: list
    impl: object  # JAX's PRNG implementation

    @property
    def shape(self) -> tuple[int, ...]:
        return self.words[0].shape


Value = np.ndarray | Scalars | Memory


def kind_of(value: Value) -> str:
    return KINDS[value.dtype] if isinstance(value, np.ndarray) else value.kind


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array in row-major order, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def on_elements(value: Value, rearrange) -> Value:
    """rearrange, a NumPy function that moves elements and does not look at them, for constants
    and scalars."""
    if isinstance(value, Scalars):
        return Scalars(rearrange(value.ids), value.kind)
    return rearrange(value)


def transpose(value: Value, permutation) -> Value:
    if isinstance(value, Memory):
        shape = tuple(value.shape[axis] for axis in permutation)
        strides = tuple(value.strides[axis] for axis in permutation)
        return dataclasses.replace(value, shape=shape, strides=strides)
    return on_elements(value, lambda elements: np.transpose(elements, permutation))


def broadcast_in_dim(value: Value, shape, dimensions) -> Value:
    """As lax.broadcast_in_dim: axis i of value becomes axis dimensions[i], others are repeated."""
    if isinstance(value, Memory):
        strides = [0] * len(shape)
        for axis, to in enumerate(dimensions):
            strides[to] = value.strides[axis] if value.shape[axis] == shape[to] else 0
        return dataclasses.replace(value, shape=tuple(shape), strides=tuple(strides))
    padded = [1] * len(shape)
    for axis, to in enumerate(dimensions):
        padded[to] = value.shape[axis]
    return on_elements(value, lambda elements: np.broadcast_to(elements.reshape(padded), shape))


def slice_(value: Value, starts, limits, steps) -> Value:
    """Axis i from starts[i] to before limits[i]."""
    if isinstance(value, Memory):
        shape = tuple(
            max(0, -(-(limit - start) // step))
            for start, limit, step in zip(starts, limits, steps, strict=True)
        )
        strides = tuple(stride * step for stride, step in zip(value.strides, steps, strict=True))
        moved = sum(start * stride for start, stride in zip(starts, value.strides, strict=True))
        return dataclasses.replace(value, shape=shape, strides=strides, offset=value.offset + moved)
    index = tuple(slice(*triple) for triple in zip(starts, limits, steps, strict=True))
    return on_elements(value, lambda elements: elements[index])


def reverse(value: Value, axes) -> Value:
    if isinstance(value, Memory):
        strides = list(value.strides)
        offset = value.offset
        for axis in axes:
            offset += (value.shape[axis] - 1) * strides[axis]
            strides[axis] = -strides[axis]
        return dataclasses.replace(value, strides=tuple(strides), offset=offset)
    return on_elements(value, lambda elements: np.flip(elements, axes))


def reshaped_view(value: Memory, shape: tuple[int, ...]) -> Memory | None:
    """value in another shape, in row-major order; None if no view of its buffer is that."""
    old = [
        (size, stride) for size, stride in zip(value.shape, value.strides, strict=True) if size != 1
    ]
    strides = []
    taken = 0
    axis = 0
    while axis < len(shape):
        if shape[axis] == 1:
            strides.append(0)
            axis += 1
            continue
        if taken == len(old):
            return None
        # The smallest groups of old and new axes that have as many elements.
        old_size, new_size = old[taken][0], shape[axis]
        first_old = taken
        first_new = axis
        taken += 1
        axis += 1
        while old_size != new_size:
            if old_size < new_size:
                if taken == len(old):
                    return None
                old_size *= old[taken][0]
                taken += 1
            else:
                if axis == len(shape):
                    return None
                new_size *= shape[axis]
                axis += 1
        for (_, stride), (inner_size, inner_stride) in zip(
            old[first_old : taken - 1], old[first_old + 1 : taken], strict=True
        ):
            if stride != inner_size * inner_stride:
                return None
        stride = old[taken - 1][1]
        group = []
        for size in reversed(shape[first_new:axis]):
            group.append(stride)
            stride *= size
        strides.extend(reversed(group))
    return dataclasses.replace(value, shape=tuple(shape), strides=tuple(strides))
