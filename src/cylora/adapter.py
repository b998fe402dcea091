"""LoraAdapter (one A/B pair), AdapterSet (a whole model's pairs in one flat vector), Gradients (the same layout)."""

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cylora import checks
from cylora.config import LoraConfig
from cylora.errors import ConfigError, InputError
from cylora.flat import FlatBuffer, FloatArray, Layout

__all__ = ["AdapterSet", "GradientPair", "Gradients", "LoraAdapter"]

Mask = NDArray[np.bool_]


def _rows(name: str, value: ArrayLike, columns: int) -> FloatArray:
    """Return ``value`` as float32 (rows, columns); a single vector becomes one row."""
    if getattr(value, "requires_grad", False):  # a tensor of torch, which does not convert such a one by itself
        value = value.detach()  # type: ignore[union-attr]
    try:
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # a ragged list, a tensor elsewhere than in memory: whatever a foreign __array__ raises
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name} must be an array of real numbers, got {type(value).__name__} ({reason})") from None
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or array.shape[-1] != columns:
        raise InputError(
            f"{name} must be real numbers of shape ({columns},) or (batch, {columns}), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return np.atleast_2d(array).astype(np.float32, copy=False)


def _same_shape(name: str, value: ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    rows = _rows(name, value, shape[1])
    if np.shape(value) != shape:
        raise InputError(f"{name} must have shape {shape}, got {np.shape(value)}")
    return rows


def _generator(seed: object) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(checks.integer("seed (if not a numpy.random.Generator)", seed, 0))


class LoraAdapter:
    """A low-rank update of one weight: W + scaling * B @ A (Hu et al. 2021, arXiv:2106.09685).

    A is drawn from U(-1/sqrt(d_in), 1/sqrt(d_in)), as PEFT draws it (Kaiming-uniform with a = sqrt(5)); B is zero, so a
    new adapter changes nothing.

    Parameters
    ----------
    d_in, d_out : int >= 1
        Width of the adapted layer's input and output.
    config : LoraConfig, optional
    seed : int or numpy.random.Generator
        Where A comes from.

    Attributes
    ----------
    a_matrix : float32 array (rank, d_in), writable view of ``flat.vector``; assigning writes into it
    b_matrix : float32 array (d_out, rank), likewise
    flat : FlatBuffer
        A, then B.

    Raises
    ------
    ConfigError
        If a dimension or the seed breaks its rule.
    """

    def __init__(
        self, d_in: int, d_out: int, config: LoraConfig | None = None, *, seed: int | np.random.Generator
    ) -> None:
        generator = _generator(seed)
        config = LoraConfig() if config is None else config
        layout = _pair_layout(d_in, d_out, config)
        (_, (_, d_in)), (_, (d_out, _)) = layout
        self._adopt(d_in, d_out, config, FlatBuffer(layout, phase=1))
        bound = 1.0 / math.sqrt(d_in)
        np.copyto(self.a_matrix, generator.uniform(-bound, bound, self.a_matrix.shape), casting="same_kind")

    def _adopt(self, d_in: int, d_out: int, config: LoraConfig, flat: FlatBuffer) -> None:
        self.d_in, self.d_out, self.config, self.flat = d_in, d_out, config, flat
        self.rank, self.alpha, self.scaling = config.rank, config.alpha, config.scaling

    @property
    def a_matrix(self) -> FloatArray:
        """A (rank, d_in): a view of ``flat.vector``. Assigning writes into it."""
        return self.flat["A"]

    @a_matrix.setter
    def a_matrix(self, values: ArrayLike) -> None:
        self.flat["A"][...] = _same_shape("a_matrix", values, self.flat["A"].shape)

    @property
    def b_matrix(self) -> FloatArray:
        """B (d_out, rank): a view of ``flat.vector``. Assigning writes into it."""
        return self.flat["B"]

    @b_matrix.setter
    def b_matrix(self, values: ArrayLike) -> None:
        self.flat["B"][...] = _same_shape("b_matrix", values, self.flat["B"].shape)

    @classmethod
    def zeros(cls, d_in: int, d_out: int, config: LoraConfig) -> Self:
        """Return an adapter whose A and B are both zero, to be filled: as it is, neither would ever learn."""
        layout = _pair_layout(d_in, d_out, config)
        return cls._over(layout[0][1][1], layout[1][1][0], config, FlatBuffer(layout, phase=1))

    @classmethod
    def _over(cls, d_in: int, d_out: int, config: LoraConfig, flat: FlatBuffer) -> Self:
        """Return an adapter whose parameters are ``flat``, as they are."""
        adapter = cls.__new__(cls)
        adapter._adopt(d_in, d_out, config, flat)
        return adapter

    def with_parameters(self, vector: FloatArray) -> Self:
        """Return a new adapter like this one that holds a copy of ``vector`` (parameters,), A and then B."""
        new = self.zeros(self.d_in, self.d_out, self.config)
        new.flat.vector[...] = vector
        return new

    def over(self, vector: FloatArray) -> Self:
        """Return an adapter like this one whose parameters are ``vector`` itself, A and then B; no copy is made.

        Over read-only memory it can be applied, exported and copied, but not trained.

        Parameters
        ----------
        vector : float32 array (parameters,), C-contiguous

        Raises
        ------
        InputError   If ``vector`` breaks its rule.
        """
        return self._over(self.d_in, self.d_out, self.config, self.flat.over(vector))

    def __repr__(self) -> str:
        return f"LoraAdapter({self.d_in} -> {self.d_out}, rank {self.rank}, alpha {self.alpha:g})"

    def apply(self, x: ArrayLike, *, mask: Mask | None = None, rng: np.random.Generator | None = None) -> FloatArray:
        """Return scaling * B (A x), the adapter's contribution to the layer's output.

        Parameters
        ----------
        x : array (d_in,) or (batch, d_in), or anything that NumPy converts, such as a tensor of torch on the CPU
        mask, rng : optional
            Dropout while training: a mask as `dropout_mask` draws it, or the generator to draw it from. Without either
            nothing is dropped.

        Returns
        -------
        float32 array (d_out,) or (batch, d_out)

        Raises
        ------
        InputError
            If a shape or type is wrong.
        """
        rows = _rows("x", x, self.d_in)
        y: FloatArray = np.matmul(self._dropped(rows, mask, rng) @ self.a_matrix.T, self.b_matrix.T)
        np.multiply(y, np.float32(self.scaling), out=y)
        return y[0] if np.ndim(x) == 1 else y

    def gradients(
        self,
        x: ArrayLike,
        grad_output: ArrayLike,
        *,
        mask: Mask | None = None,
        rng: np.random.Generator | None = None,
        out: "GradientPair | tuple[FloatArray, FloatArray] | None" = None,
    ) -> "GradientPair":
        """Return dL/dA and dL/dB by the chain rule, summed over the batch.

        With h = A x and g = dL/dy: dL/dB = scaling * g h^T, dL/dA = scaling * (B^T g) x^T.

        Parameters
        ----------
        x : array (d_in,) or (batch, d_in)
            What `apply` got.
        grad_output : array (d_out,) or (batch, d_out)
            Gradient of the loss by the layer's output.
        mask, rng : optional
            The mask the forward pass used, or a generator in the state the forward pass found it in. One of the two is
            required where the config has dropout > 0.
        out : pair of float32 arrays (rank, d_in), (d_out, rank), written
            Instead of new arrays; an entry of a `Gradients` fits.

        Raises
        ------
        InputError
            If a shape or type is wrong, ``out`` overlaps itself, ``x`` or the parameters, or dropout is configured and
            neither mask nor rng is given.
        """
        if self.config.dropout > 0 and mask is None and rng is None:
            raise InputError(f"mask or rng must be given because dropout is {self.config.dropout}, got neither")
        rows, grad_rows = _rows("x", x, self.d_in), _rows("grad_output", grad_output, self.d_out)
        if len(rows) != len(grad_rows):
            raise InputError(f"grad_output must have the batch size of x, {len(rows)}, got {len(grad_rows)}")
        rows = self._dropped(rows, mask, rng)
        pair = GradientPair(np.empty_like(self.a_matrix), np.empty_like(self.b_matrix)) if out is None else out
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"out must be a pair (grad_a, grad_b), got {type(pair).__name__}")
        grad_a = checks.matrix("out[0]", pair[0], self.a_matrix.shape, InputError)
        grad_b = checks.matrix("out[1]", pair[1], self.b_matrix.shape, InputError)
        if out is not None:
            inputs = (rows, grad_rows, self.flat.vector)
            if np.may_share_memory(*out) or any(np.may_share_memory(a, b) for a in out for b in inputs):
                raise InputError("out must not overlap itself, x, grad_output or the parameters in memory")
        scaled = grad_rows * np.float32(self.scaling)
        np.matmul((scaled @ self.b_matrix).T, rows, out=grad_a)
        np.matmul(scaled.T, rows @ self.a_matrix.T, out=grad_b)
        return GradientPair(grad_a, grad_b)

    def input_gradient(self, grad_output: ArrayLike, *, mask: Mask | None = None) -> FloatArray:
        """Return dL/dx through the adapter alone: scaling * A^T B^T g, for the layers before this one.

        Parameters
        ----------
        grad_output : array (d_out,) or (batch, d_out)
        mask : optional
            The mask the forward pass used.

        Returns
        -------
        float32 array (d_in,) or (batch, d_in)
        """
        rows = _rows("grad_output", grad_output, self.d_out)
        hidden: FloatArray = np.multiply(rows, np.float32(self.scaling)) @ self.b_matrix
        grad_x: FloatArray = np.matmul(hidden, self.a_matrix)
        grad_x = self._dropped(grad_x, mask, None)
        return grad_x[0] if np.ndim(grad_output) == 1 else grad_x

    def dropout_mask(self, shape: tuple[int, ...], rng: np.random.Generator) -> Mask:
        """Draw which elements of an input of ``shape`` are kept: True with probability 1 - dropout."""
        if not isinstance(rng, np.random.Generator):
            raise InputError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
        return rng.random(shape, dtype=np.float32) >= self.config.dropout

    def _dropped(self, rows: FloatArray, mask: Mask | None, rng: np.random.Generator | None) -> FloatArray:
        """Zero what the mask drops and scale the rest by 1 / (1 - dropout)."""
        if mask is None:
            if rng is None or self.config.dropout == 0:
                return rows
            mask = self.dropout_mask(rows.shape, rng)
        mask = np.atleast_2d(np.asarray(mask))
        if mask.dtype != np.bool_ or mask.shape != rows.shape:
            raise InputError(f"mask must be bool of shape {rows.shape}, got {mask.dtype} of shape {mask.shape}")
        return np.where(mask, rows * np.float32(1.0 / (1.0 - self.config.dropout)), np.float32(0.0))

    def delta_weight(self) -> FloatArray:
        """Return scaling * B @ A, float32 (d_out, d_in)."""
        delta: FloatArray = self.b_matrix @ self.a_matrix
        delta *= np.float32(self.scaling)
        return delta

    def merge_into(self, weight: FloatArray) -> None:
        """Add scaling * B @ A to ``weight`` (float32 (d_out, d_in), written)."""
        target = checks.matrix("weight", weight, (self.d_out, self.d_in), InputError)
        target += self.delta_weight()

    def unmerge_from(self, weight: FloatArray) -> None:
        """Take scaling * B @ A off ``weight`` again (float32 (d_out, d_in), written): exact up to float32 rounding."""
        target = checks.matrix("weight", weight, (self.d_out, self.d_in), InputError)
        target -= self.delta_weight()

    def param_count(self) -> int:
        """Return rank * (d_in + d_out)."""
        return self.flat.vector.size

    def memory_bytes(self) -> int:
        """Return the bytes A and B take: 4 a parameter."""
        return self.flat.vector.nbytes


def _pair_layout(d_in: int, d_out: int, config: LoraConfig) -> Layout:
    d_in, d_out = (checks.integer(name, size, 1, 2**31) for name, size in (("d_in", d_in), ("d_out", d_out)))
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"config must be a LoraConfig, got {type(config).__name__}")
    config.require_one_shape()
    return (("A", (config.rank, d_in)), ("B", (d_out, config.rank)))


class AdapterSet(Mapping[str, LoraAdapter]):
    """The adapters of a whole model, by module name, in one flat vector that one kernel call updates.

    Parameters
    ----------
    shapes : mapping of module name to (d_in, d_out)
        In the order of the vector.
    config : LoraConfig, optional
        For all of them, but for what its ``rank_pattern`` and ``alpha_pattern`` say of some; `from_adapters` takes
        adapters of any configs.
    seed : int >= 0
        With a module's name it decides that module's A, whatever else is in the set.

    Attributes
    ----------
    flat : FlatBuffer
        "<name>.A", "<name>.B" for each name.
    origin : dict
        What a file these adapters came from said besides (the base model's name, say), for those who write files.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: LoraConfig | None = None, *, seed: int) -> None:
        seed = checks.integer("seed", seed, 0)
        if not isinstance(shapes, Mapping):
            raise ConfigError(f"shapes must be a mapping of name to (d_in, d_out), got {type(shapes).__name__}")
        names = [str(name) for name in shapes]
        configs = [config] * len(names) if not isinstance(config, LoraConfig) else config.for_modules(names)
        drawn = {}
        for (name, shape), own in zip(shapes.items(), configs, strict=True):
            try:
                d_in, d_out = shape
            except (TypeError, ValueError):
                raise ConfigError(f"shapes[{name!r}] must be (d_in, d_out), got {shape!r}") from None
            generator = np.random.default_rng([seed, zlib.crc32(str(name).encode(errors="surrogatepass"))])
            drawn[name] = LoraAdapter(d_in, d_out, own, seed=generator)
        self._copy(drawn)

    @classmethod
    def from_adapters(cls, adapters: Mapping[str, LoraAdapter]) -> Self:
        """Return a set that holds copies of ``adapters``; ranks and scales may differ."""
        new = cls.__new__(cls)
        new._copy(adapters)
        return new

    @classmethod
    def zeros(cls, members: Mapping[str, tuple[int, int, LoraConfig]]) -> Self:
        """Return a set whose A and B are all zero, to be filled: of such adapters neither would ever learn.

        ``members`` maps each name to (d_in, d_out, config).
        """
        new = cls.__new__(cls)
        new._allocate(members)
        return new

    def with_parameters(self, vector: FloatArray) -> Self:
        """Return a new set like this one that holds a copy of ``vector`` (parameters,), in this one's layout."""
        new = self.zeros({name: (one.d_in, one.d_out, one.config) for name, one in self.items()})
        new.origin = dict(self.origin)
        new.flat.vector[...] = vector
        return new

    def over(self, vector: FloatArray) -> Self:
        """Return a set like this one whose parameters are ``vector`` itself, as `LoraAdapter.over` does."""
        new = type(self).__new__(type(self))
        new.flat, new.origin, new._members = self.flat.over(vector), dict(self.origin), {}
        start = 0
        for name, one in self.items():
            stop = start + one.flat.vector.size
            new._members[name] = one.over(new.flat.vector[start:stop])
            start = stop
        return new

    def _copy(self, adapters: Mapping[str, LoraAdapter]) -> None:
        if not isinstance(adapters, Mapping):
            raise ConfigError(f"an AdapterSet must hold at least one adapter by name, got {type(adapters).__name__}")
        for name, one in adapters.items():
            if not isinstance(one, LoraAdapter):
                raise ConfigError(f"adapters[{name!r}] must be a LoraAdapter, got {type(one).__name__}")
        self._allocate({name: (one.d_in, one.d_out, one.config) for name, one in adapters.items()})
        for name, one in adapters.items():
            self[name].flat.vector[...] = one.flat.vector

    def _allocate(self, members: Mapping[str, tuple[int, int, LoraConfig]]) -> None:
        if not members:
            raise ConfigError("an AdapterSet must hold at least one adapter by name, got none")
        for name in members:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"adapter names must be non-empty strings, got {name!r}")
        pairs = {name: _pair_layout(*member) for name, member in members.items()}
        self.flat = FlatBuffer([(f"{n}.{part}", shape) for n, pair in pairs.items() for part, shape in pair], phase=1)
        self.origin: dict[str, Any] = {}
        self._members: dict[str, LoraAdapter] = {}
        start = 0
        for name, (d_in, d_out, config) in members.items():
            part = self.flat.part(start, pairs[name])
            self._members[name] = LoraAdapter._over(int(d_in), int(d_out), config, part)
            start += part.vector.size

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with one flat vector again."""
        return _restored_set, (type(self), self._members, self.origin)

    def __getitem__(self, name: str) -> LoraAdapter:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"AdapterSet({len(self)} adapters, {self.param_count()} parameters)"

    @property
    def config(self) -> LoraConfig:
        """The first adapter's config; the others' may differ."""
        return next(iter(self._members.values())).config

    def param_count(self) -> int:
        """Return the number of parameters of all adapters."""
        return self.flat.vector.size

    def memory_bytes(self) -> int:
        """Return the bytes the parameters take: 4 each."""
        return self.flat.vector.nbytes


def _restored_set(cls: type[AdapterSet], members: Mapping[str, LoraAdapter], origin: dict[str, Any]) -> AdapterSet:
    restored = cls.from_adapters(members)
    restored.origin = origin
    return restored


class GradientPair(NamedTuple):
    """dL/dA (rank, d_in) and dL/dB (d_out, rank), float32."""

    grad_a: FloatArray
    grad_b: FloatArray


class Gradients(Mapping[str, GradientPair]):
    """A zeroed gradient buffer in the layout of some adapters, for the caller to write into.

    Parameters
    ----------
    adapters : AdapterSet or LoraAdapter
        A lone adapter's gradients have the key "adapter".

    Attributes
    ----------
    vector : float32 array (parameters,), 64-byte aligned
    layout : tuple of (name, shape)
    """

    def __init__(self, adapters: AdapterSet | LoraAdapter) -> None:
        if not isinstance(adapters, (AdapterSet, LoraAdapter)):
            raise InputError(f"adapters must be an AdapterSet or a LoraAdapter, got {type(adapters).__name__}")
        self._adopt(adapters.flat.like())

    def _adopt(self, flat: FlatBuffer) -> None:
        self._flat, self.vector, self.layout = flat, flat.vector, flat.layout
        names = [name for name, _ in flat.layout]
        pairs = zip(names[::2], names[1::2], strict=True)
        self._pairs = {a[:-2] or "adapter": GradientPair(flat[a], flat[b]) for a, b in pairs}

    @classmethod
    def _over(cls, flat: FlatBuffer) -> Self:
        """Return gradients whose memory is ``flat``."""
        gradients = cls.__new__(cls)
        gradients._adopt(flat)
        return gradients

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with one flat vector again."""
        return type(self)._over, (self._flat,)

    def __getitem__(self, name: str) -> GradientPair:
        return self._pairs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def zero_(self) -> None:
        """Set every gradient to zero."""
        self.vector.fill(0.0)
