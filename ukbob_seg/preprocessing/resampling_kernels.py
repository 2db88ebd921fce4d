"""Compiled loops of ``resampling.py``.

Each works on a range of planes or blocks, touches nothing outside it and releases the interpreter lock, so that plain
threads share the work: no numba thread pool, which neither survives a fork nor always takes calls from two threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 256  # voxels along the fast axis that go through a spline together; 28 lines of them fit the first cache
LINES = 32  # lines along the fast axis that are filtered together


@njit(cache=True, nogil=True, fastmath={"contract"})
def spline_rows(source, first, weights, result, start, stop):  # type: ignore[no-untyped-def]
    """Filter the middle axis of (outer, old, inner) into (outer, new, inner).

    Blocks ``start`` to ``stop`` of outer * ceil(inner / BLOCK) are done.
    """
    inner = source.shape[2]
    blocks = -(-inner // BLOCK)
    for unit in range(start, stop):
        outer = unit // blocks
        low = (unit % blocks) * BLOCK
        high = min(low + BLOCK, inner)
        _combine(source[outer, :, low:high], first, weights, result[outer, :, low:high])


@njit(cache=True, nogil=True, fastmath={"contract"})
def spline_lines(source, first, weights, result, start, stop):  # type: ignore[no-untyped-def]
    """Filter the last axis of (lines, old) into (lines, new); groups ``start`` to ``stop`` of LINES lines are done.

    Lines are transposed into a small buffer so that the inner loop runs over neighbouring memory.
    """
    old, new = source.shape[1], result.shape[1]
    before = np.zeros((old, LINES), dtype=np.float32)
    after = np.empty((new, LINES), dtype=np.float32)
    for group in range(start, stop):
        low = group * LINES
        count = min(LINES, source.shape[0] - low)
        for line in range(count):
            for x in range(old):
                before[x, line] = source[low + line, x]
        _combine(before, first, weights, after)
        for line in range(count):
            for x in range(new):
                result[low + line, x] = after[x, line]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _combine(source, first, weights, result):  # type: ignore[no-untyped-def]
    """Each row of ``result`` is a weighted sum of neighbouring rows of ``source``."""
    taps = weights.shape[1]
    for k in range(result.shape[0]):
        row = result[k]
        row[:] = 0
        t = 0
        while t + 4 <= taps:
            a, b, c, d = weights[k, t], weights[k, t + 1], weights[k, t + 2], weights[k, t + 3]
            at = first[k] + t
            one, two, three, four = source[at], source[at + 1], source[at + 2], source[at + 3]
            for i in range(row.shape[0]):
                row[i] += (a * one[i] + b * two[i]) + (c * three[i] + d * four[i])
            t += 4
        while t < taps:
            a, one = weights[k, t], source[first[k] + t]
            for i in range(row.shape[0]):
                row[i] += a * one[i]
            t += 1


@njit(cache=True, nogil=True)
def vote_labels(labels, z, y, x, result, start, stop):  # type: ignore[no-untyped-def]
    """Planes ``start`` to ``stop`` of the label map; ``z``, ``y``, ``x`` are (low, high, part, whole)."""
    y_low, y_high, y_part, y_whole = y
    x_low, x_high, x_part, x_whole = x
    even = np.empty(labels.shape[2], dtype=np.bool_)
    values = np.empty(8, dtype=labels.dtype)
    votes = np.empty(8, dtype=np.int64)
    for k in range(start, stop):
        z_low, z_high, z_part, z_whole = z[0][k], z[1][k], z[2][k], z[3]
        for j in range(result.shape[1]):
            a, b = labels[z_low, y_low[j]], labels[z_low, y_high[j]]
            c, d = labels[z_high, y_low[j]], labels[z_high, y_high[j]]
            for i in range(even.shape[0]):
                even[i] = (a[i] == b[i]) & (a[i] == c[i]) & (a[i] == d[i])
            for i in range(result.shape[2]):
                left, right = x_low[i], x_high[i]
                if even[left] & even[right] & (a[left] == a[right]):
                    result[k, j, i] = a[left]
                    continue
                values[0], values[1], values[2], values[3] = a[left], a[right], b[left], b[right]
                values[4], values[5], values[6], values[7] = c[left], c[right], d[left], d[right]
                for n in range(8):
                    vote = z_part if n & 4 else z_whole - z_part
                    vote *= y_part[j] if n & 2 else y_whole - y_part[j]
                    vote *= x_part[i] if n & 1 else x_whole - x_part[i]
                    votes[n] = vote
                nearest = (4 if 2 * z_part >= z_whole else 0) + (2 if 2 * y_part[j] >= y_whole else 0)
                nearest += 1 if 2 * x_part[i] >= x_whole else 0
                result[k, j, i] = _winner(values, votes, values[nearest])


@njit(cache=True, nogil=True)
def _winner(values, votes, nearest):  # type: ignore[no-untyped-def]
    """The value with most votes; of equals the nearest voxel's, then the lowest."""
    best, best_votes = values[0], np.int64(-1)
    for n in range(8):
        total = np.int64(0)
        for m in range(8):
            if values[m] == values[n]:
                total += votes[m]
        if total > best_votes:
            best, best_votes = values[n], total
        elif total == best_votes and (values[n] == nearest or (best != nearest and values[n] < best)):
            best = values[n]
    return best


@njit(cache=True, nogil=True)
def best_class(logits, z, y, x, result, start, stop):  # type: ignore[no-untyped-def]
    """Planes ``start`` to ``stop`` of the argmax over classes; ``z``, ``y``, ``x`` are (low, high, weight).

    One class at a time: its plane is made, compared with the best so far, and forgotten.
    """
    rows = np.empty((logits.shape[2], result.shape[2]), dtype=np.float32)
    line = np.empty(logits.shape[3], dtype=np.float32)
    best = np.empty(result.shape[1:], dtype=np.float32)
    winner = np.empty(result.shape[1:], dtype=np.int32)
    for k in range(start, stop):
        best[:] = -np.inf
        winner[:] = 0
        for c in range(logits.shape[0]):
            _widened_rows(logits[c], z[0][k], z[1][k], z[2][k], x, line, rows)
            for j in range(best.shape[0]):
                upper, lower, weight = rows[y[0][j]], rows[y[1][j]], y[2][j]
                best_row, winner_row = best[j], winner[j]
                for i in range(best.shape[1]):
                    value = _between(upper[i], lower[i], weight)
                    better = value > best_row[i]
                    best_row[i] = value if better else best_row[i]
                    winner_row[i] = c if better else winner_row[i]
        _copy_plane(winner, result[k])


@njit(cache=True, nogil=True)
def last_positive(logits, z, y, x, result, start, stop):  # type: ignore[no-untyped-def]
    """Planes ``start`` to ``stop`` of 1 + the last region with a positive logit, 0 where there is none."""
    rows = np.empty((logits.shape[2], result.shape[2]), dtype=np.float32)
    line = np.empty(logits.shape[3], dtype=np.float32)
    winner = np.empty(result.shape[1:], dtype=np.int32)
    for k in range(start, stop):
        winner[:] = 0
        for c in range(logits.shape[0]):
            _widened_rows(logits[c], z[0][k], z[1][k], z[2][k], x, line, rows)
            for j in range(winner.shape[0]):
                upper, lower, weight = rows[y[0][j]], rows[y[1][j]], y[2][j]
                winner_row = winner[j]
                for i in range(winner.shape[1]):
                    winner_row[i] = c + 1 if _between(upper[i], lower[i], weight) > 0 else winner_row[i]
        _copy_plane(winner, result[k])


@njit(cache=True, nogil=True)
def interpolate_planes(logits, z, y, x, result, start, stop):  # type: ignore[no-untyped-def]
    """Planes ``start`` to ``stop`` of all classes, into ``result`` (K, stop - start, Y', X')."""
    rows = np.empty((logits.shape[2], result.shape[3]), dtype=np.float32)
    line = np.empty(logits.shape[3], dtype=np.float32)
    for k in range(start, stop):
        for c in range(logits.shape[0]):
            _widened_rows(logits[c], z[0][k], z[1][k], z[2][k], x, line, rows)
            for j in range(result.shape[2]):
                upper, lower, weight = rows[y[0][j]], rows[y[1][j]], y[2][j]
                for i in range(result.shape[3]):
                    result[c, k - start, j, i] = _between(upper[i], lower[i], weight)


@njit(cache=True, nogil=True)
def _copy_plane(source, result):  # type: ignore[no-untyped-def]
    """Spelled out: assigning one array to another costs numba four seconds of compilation."""
    for j in range(result.shape[0]):
        for i in range(result.shape[1]):
            result[j, i] = source[j, i]


@njit(cache=True, nogil=True)
def _widened_rows(source, z_low, z_high, z_weight, x, line, rows):  # type: ignore[no-untyped-def]
    """One plane (Y, X) of one class, interpolated along z and x: ``rows`` (Y, X')."""
    x_low, x_high, x_weight = x
    for y in range(rows.shape[0]):
        near, far = source[z_low, y], source[z_high, y]
        for i in range(line.shape[0]):
            line[i] = _between(near[i], far[i], z_weight)
        for i in range(rows.shape[1]):
            rows[y, i] = _between(line[x_low[i]], line[x_high[i]], x_weight[i])


@njit(cache=True, nogil=True, inline="always")
def _between(low, high, weight):  # type: ignore[no-untyped-def]
    """Linear interpolation; weight 0 gives ``low`` even where ``high`` is infinite."""
    return low if weight == 0 else (np.float32(1) - weight) * low + weight * high
