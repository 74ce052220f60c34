"""Thresholds of the fast paths, in one place.

Each was measured as a ratio between two ways to compute the same token. `Xeon` is an Intel Xeon with AMX (model 207),
2 cores, PyTorch 2.13, one thread, CPU time of the thread, November 2026. `Zen 5` is an AMD EPYC with AVX-512, 2 cores,
PyTorch 2.13, two threads, November 2026. `Zen 4` is an AMD EPYC with AVX512_BF16 and 32 MB of third-level cache,
2 cores, PyTorch 2.13, one thread, CPU time of the thread on a busy machine, November 2026. `H200` is an NVIDIA H200, PyTorch 2.11. Other CPUs were not measured.
`tests/benchmarks/README.md` has the figures.

| constant | decides | measured |
|---|---|---|
| `NUMPY_BELOW` | numpy step or torch step on a CPU | Xeon: 0.8 M weights 1.5 to 2.0 times as fast for 1 row, 1.3 to 1.8 for 2 to 32, 1.1 for 64; 4.8 M: 1.3 to 1.5 for 1 to 8 rows, 1.1 for 32; 10.7 M: 1.1 for 1 row |
| `VECTOR_SIZE` | numpy's or torch's matrix-vector products, for 1 row | above this size numpy's BLAS starts threads, which compete with torch's (Zen 5); Xeon: numpy 1.1 times as fast below |
| `ERF_BELOW` | GELU through `erf` or torch's own | Zen 5: torch's GELU takes 6 µs to begin, and is faster beyond 4096 numbers |
| `COPY_FROM_ROWS` | weights transposed in memory | Xeon: 1.1 to 1.4 times as fast for 6 to 64 rows, no gain for 1 to 4 |
| `PACK_FROM_WEIGHT`, `PACK_FROM_PRODUCT` | oneDNN's packed matmul, AMD only | Zen 5: 2 to 3 times as fast; Xeon: 0.5 to 0.7 for 1 row, 0.9 to 1.0 for 64 and 256 |
| `CAPTURE_FROM_IDS` | CUDA graphs or eager kernels | H200: capturing takes the time of about ten eager tokens |
| `SHORTEST_SPAN` | shortest attention span of a CUDA graph | H200: attention over fewer positions takes no less time |
| `SMALL_FROM_WEIGHT` | bfloat16 and int8 weights, if asked for | Zen 4, one row: bfloat16 1.5 times as fast as float32 for 3 · 2^16 numbers, 0.9 to 1.2 for 2^16 and fewer; int8 2.4 to 4 times from 3 · 2^14 on, but a token of 0.8 M weights takes 2 to 4 times as long as numpy's |
| `UNPACK_FROM_ROWS` | int8 weights multiplied as they are, or converted to bfloat16 for each product | Zen 4, 10.7 M weights, 8, 16, 64 and 128 rows: 3.0, 5.6, 20 and 41 ms as they are, 4.4, 5.1, 11 and 18 converted |
"""  # noqa: E501

NUMPY_BELOW = 2**26
"""Multiply-adds of a token: rows × numbers in the weight matrices."""
VECTOR_SIZE = 2**13
"""Numbers in a matrix, inclusive."""
ERF_BELOW = 2**12
"""Numbers in the input of GELU, inclusive."""
COPY_FROM_ROWS = 5
"""Rows of the input."""
PACKED_FOR = 64
"""Rows of the input; a weight packed for one row is slow for every other number of rows."""
PACK_FROM_WEIGHT = 2**17
"""Numbers in a weight matrix."""
PACK_FROM_PRODUCT = 3 * 2**18
"""Multiply-adds of one matmul."""
CAPTURE_FROM_IDS = 32
"""Ids still to be read."""
SHORTEST_SPAN = 64
"""Positions."""
SMALL_FROM_WEIGHT = 2**17
"""Numbers in a weight matrix."""
UNPACK_FROM_ROWS = 16
"""Rows of the input."""
