"""What a router's step needs beside linear layers: paged attention, and programs of decoder layers.

Structures mirror kernels/src/router_ops.h, where their fields are described. They hold addresses;
the caller keeps the memory alive. Activations are float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from faasmoe_kernels.library import KernelDtype, KernelLibrary, Matrix, MatrixStruct, to_struct

SERIAL_MULTIPLICATIONS = 1 << 20
"""Products below this size run on the caller's thread: waking others would take longer."""

_i32, _i64, _f32, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Rope(IntEnum):
    """How angles rotate the first elements of a head."""

    NONE = 0
    HALVES = 1
    HALVES_NARROW = 2
    PAIRS = 3
    PAIRS_NARROW = 4


class Scoring(IntEnum):
    """How a gate turns logits into weights."""

    SOFTMAX = 0
    SIGMOID = 1
    TOP_K_SOFTMAX = 2


class Attention(ctypes.Structure):
    """Attention of one layer (`fk_attention`)."""

    _fields_ = (
        *((name, _i64) for name in ("n_heads", "n_kv_heads", "head_dim", "window", "n_slots")),
        *((name, _pointer) for name in ("k_cache", "v_cache", "sinks")),
        ("cache_dtype", _i32),
        ("scaling", _f32),
        ("softcap", _f32),
    )


class AttentionBatch(ctypes.Structure):
    """The requests of a batch (`fk_attention_batch`)."""

    _fields_ = (
        ("n_requests", _i64),
        *((n, _pointer) for n in ("query_offsets", "key_offsets", "read_index", "write_index")),
    )


class Norm(ctypes.Structure):
    """A root-mean-square norm (`fk_norm`); without weight there is none."""

    _fields_ = (("weight", _pointer), ("width", _i64), ("epsilon", _f32))


class Gate(ctypes.Structure):
    """Chooses the experts of a row (`fk_gate`)."""

    _fields_ = (
        ("weight", MatrixStruct),
        ("selection_bias", _pointer),
        ("top_k", _i64),
        ("scoring", _i32),
        ("is_normalized", _i32),
        ("scale", _f32),
        ("epsilon", _f32),
        ("n_groups", _i32),
        ("top_groups", _i32),
        ("scores_per_group", _i32),
    )


class MLP(ctypes.Structure):
    """A gated MLP (`fk_mlp`)."""

    _fields_ = (
        *((name, MatrixStruct) for name in ("gate", "up", "down")),
        ("activation", _i32),
    )


class Layer(ctypes.Structure):
    """A decoder layer (`fk_layer`)."""

    _fields_ = (
        *((n, Norm) for n in ("input_norm", "query_norm", "key_norm", "feed_forward_norm")),
        *((name, MatrixStruct) for name in ("query", "key", "value", "output")),
        ("attention", Attention),
        *((name, _i64) for name in ("attention_group", "rope_table", "rope_width")),
        ("rope", _i32),
        ("residual_scale", _f32),
        ("moe_layer", _i64),
        ("gate", Gate),
        ("mlp", MLP),
        ("mlp_gate", MatrixStruct),
    )


class Head(ctypes.Structure):
    """The last norm and the LM head (`fk_head`)."""

    _fields_ = (("norm", Norm), ("weight", MatrixStruct), ("scale", _f32))


_ROWS = (_pointer, _i64, _i64, _i64, _i64, _pointer, _pointer, _pointer)
ComputeExperts = ctypes.CFUNCTYPE(_i32, *_ROWS, _pointer)
"""context, layer, rows, hidden size, k, addresses of hidden, index, weight and output; a status."""


class _ExpertsPort(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("context", "begin", "finish", "compute_context")),
        ("compute", ComputeExperts),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _i64),
        ("hidden", _pointer),
        ("n_groups", _i64),
        ("groups", _pointer),
        ("n_rope_tables", _i64),
        ("cosines", _pointer),
        ("sines", _pointer),
        ("first_layer", _i64),
        ("n_layers", _i64),
        ("n_scores", _i64),
        *((name, _pointer) for name in ("score_rows", "scores", "peaks", "tokens")),
        ("n_draws", _i64),
        ("draws", _pointer),
        ("n_threads", _i32),
    )


class Draw(ctypes.Structure):
    """A token that is drawn from a row of scores (`fk_draw`)."""

    _fields_ = (
        *((name, _i64) for name in ("row", "top_k")),
        *((name, ctypes.c_double) for name in ("top_p", "min_p", "uniform")),
        ("temperature", _f32),
    )


@dataclass(frozen=True, slots=True)
class ScorePlaces:
    """Which rows' scores a program computes, and where to.

    Attributes:
        n_rows: number of rows N.
        rows: address of the rows, int32 [N].
        scores: address of the scores, float32 [N, V].
        peaks: address of the highest score of each, NaN if one is, float32 [N].
        tokens: address of the first index of that score, int32 [N]; of the token if it is drawn.
        draws: which rows' tokens are drawn, at most one of a row.
    """

    n_rows: int
    rows: int
    scores: int
    peaks: int
    tokens: int
    draws: Sequence[Draw] = ()


class HighestScores:
    """Finds the highest score of each row.

    Args:
        library: the kernel library.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._check = library.check
        arguments = (_pointer, _i64, _i64, _pointer, _pointer)
        self._run = library.function("fk_highest_scores", arguments)

    def __call__(self, scores: int, rows: int, vocabulary: int, *, peaks: int, tokens: int) -> None:
        """Find them; arguments are described by ScorePlaces."""
        self._check(self._run(scores, rows, vocabulary, peaks, tokens))


class TokenDrawer:
    """Draws tokens from scores.

    Args:
        library: the kernel library.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._check = library.check
        arguments = (_pointer, _i64, _i64, _pointer, _i64, _pointer, _i32)
        self._run = library.function("fk_draw_tokens", arguments)

    def __call__(
        self,
        scores: int,
        rows: int,
        vocabulary: int,
        draws: Sequence[Draw],
        *,
        tokens: int,
        n_threads: int,
    ) -> None:
        """Write the token of each draw.

        Args:
            scores: address of the scores, float32 [N, V].
            rows: number of rows N.
            vocabulary: scores V per row.
            draws: the draws, at most one of a row.
            tokens: address of the tokens, int32 [N]; those of other rows are not written.
            n_threads: threads to use at most, the caller's included.

        Raises:
            KernelError: a draw from a row that there is not, or out of its range.
        """
        table = (Draw * len(draws))(*draws)
        address = ctypes.addressof(table)
        self._check(self._run(scores, rows, vocabulary, address, len(draws), tokens, n_threads))


class PreparedLinear:
    """A linear layer over one weight matrix, for many calls.

    Args:
        library: the kernel library.
        weight: the matrix [n, k].
    """

    def __init__(self, library: KernelLibrary, weight: Matrix) -> None:
        self._check = library.check
        self._run = library.function(
            "fk_linear",
            (_pointer, _pointer, _i32, _i64, _i64, _pointer, _i32, _i64, _i32),
        )
        self.struct = to_struct(weight)
        self._address = ctypes.addressof(self.struct)
        self._n, self._k = weight.n, weight.k

    def __call__(self, x: int, dtype: KernelDtype, rows: int, out: int, n_threads: int) -> None:
        """Write x @ weight.T (+ bias).

        Args:
            x: address of the input, [rows, k], contiguous.
            dtype: type of input and output.
            rows: number of rows.
            out: address of the output, [rows, n], contiguous.
            n_threads: threads to use at most, the caller's included.
        """
        if rows * self._n * self._k < SERIAL_MULTIPLICATIONS:
            n_threads = 1
        status = self._run(self._address, x, dtype, self._k, rows, out, dtype, self._n, n_threads)
        if status:
            self._check(status)


class PagedAttention:
    """Attention over a paged cache.

    Args:
        library: the kernel library.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._check = library.check
        self._run = library.function(
            "fk_paged_attention",
            (_pointer, _pointer, _pointer, _i64, _pointer, _i64, _pointer, _i64, _pointer, _i32),
        )

    def __call__(
        self,
        attention: Attention,
        batch: AttentionBatch,
        *,
        queries: int,
        query_stride: int,
        keys: int,
        key_stride: int,
        values: int,
        value_stride: int,
        out: int,
        n_threads: int,
    ) -> None:
        """Compute attention and then write the new keys and values to the cache.

        Args:
            attention: the layer's attention.
            batch: the requests.
            queries: address of the queries, float32 [rows, n_heads * head_dim].
            query_stride: elements from one row to the next.
            keys: address of the new keys, float32 [rows, n_kv_heads * head_dim].
            key_stride: elements from one row to the next.
            values: address of the new values, like the keys.
            value_stride: elements from one row to the next.
            out: address of the output, float32 [rows, n_heads * head_dim], contiguous.
            n_threads: threads to use at most, the caller's included.

        Raises:
            KernelError: a size, slot or address that cannot be used.
        """
        self._check(
            self._run(
                *(ctypes.addressof(attention), ctypes.addressof(batch), queries, query_stride),
                *(keys, key_stride, values, value_stride, out, n_threads),
            )
        )


class LayerProgram:
    """Decoder layers that run as one call, which releases the GIL.

    Args:
        library: the kernel library.
        hidden_size: width of the hidden states.
        layers: the layers; what they point to has to stay alive.
        compute: computes routed experts, see ComputeExperts; returns 0, or a negative value.
        begin: address of a native function that starts the experts of a layer; None for none.
        finish: address of the native function that ends them.
        context: first argument of both.
        head: the last norm and the LM head; None for a program that computes no scores.

    Raises:
        KernelError: layers that cannot be run.
    """

    def __init__(
        self,
        library: KernelLibrary,
        hidden_size: int,
        layers: Sequence[Layer],
        compute: Callable[..., int],
        *,
        begin: int | None = None,
        finish: int | None = None,
        context: int | None = None,
        head: Head | None = None,
    ) -> None:
        self._check = library.check
        self._compute = ComputeExperts(compute)  # kept alive as long as the program
        arguments = (_i64, _i64, _pointer, _pointer, _pointer)
        create = library.function("fk_program_create", arguments, _pointer)
        self._run = library.function("fk_program_run", (_pointer, _pointer))
        self._overlap = library.function("fk_program_overlap", (_pointer,))
        self._free = library.function("fk_program_free", (_pointer,), None)
        table = (Layer * len(layers))(*layers)
        port = _ExpertsPort(context, begin, finish, None, self._compute)
        self._program: int | None = create(
            *(hidden_size, len(layers), ctypes.addressof(table), ctypes.addressof(port)),
            None if head is None else ctypes.addressof(head),
        )
        if self._program is None:
            self._check(-1)
        self.n_layers = len(layers)

    def __del__(self) -> None:
        """Free the program."""
        if getattr(self, "_program", None) is not None:
            self._free(self._program)

    def run(
        self,
        hidden: int,
        rows: int,
        *,
        groups: Sequence[AttentionBatch],
        angles: Sequence[tuple[int, int]],
        n_threads: int,
        first_layer: int = 0,
        n_layers: int | None = None,
        scores: ScorePlaces | None = None,
    ) -> None:
        """Run layers on a batch.

        Args:
            hidden: address of the hidden states, float32 [rows, hidden_size]; modified in place.
            rows: number of rows.
            groups: the requests as each kind of attention sees them.
            angles: addresses of cosines and sines, float32 [rows, angles], by rope table.
            n_threads: threads to use at most, the caller's included.
            first_layer: the first layer to run.
            n_layers: how many to run; None for all from there.
            scores: which rows' scores to compute afterwards; None for none.

        Raises:
            KernelError: an argument that cannot be used, or experts that were not computed.
        """
        group_table = (AttentionBatch * len(groups))(*groups)
        cosines = (_pointer * max(1, len(angles)))(*(cosine for cosine, _ in angles))
        sines = (_pointer * max(1, len(angles)))(*(sine for _, sine in angles))
        draw_table = (Draw * (0 if scores is None else len(scores.draws)))(
            *(() if scores is None else scores.draws)
        )
        step = _Step(
            *(rows, hidden, len(groups), ctypes.addressof(group_table), len(angles)),
            *(ctypes.addressof(cosines), ctypes.addressof(sines), first_layer),
            self.n_layers - first_layer if n_layers is None else n_layers,
            *_score_fields(scores, draw_table),
            n_threads,
        )
        self._check(self._run(self._program, ctypes.addressof(step)))

    def overlap(self) -> None:
        """Compute the shared expert of the layer whose experts are being computed."""
        self._check(self._overlap(self._program))


def _score_fields(places: ScorePlaces | None, draws: ctypes.Array[Draw]) -> tuple[int | None, ...]:
    """Return the fields of a step that tell which scores it computes, and where to."""
    if places is None:
        return 0, None, None, None, None, 0, None
    addresses = places.rows, places.scores, places.peaks, places.tokens
    return places.n_rows, *addresses, len(draws), ctypes.addressof(draws)
