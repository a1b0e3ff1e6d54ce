"""Every collective of one forward pass or decoding step, stated from sizes alone: to be held against an audit.

`sharding.formulas` says what a layout needs to send; this says what its compiled program sends, buffers and their
padding included. Parameters are whole on every data shard, as in evaluation and serving. Figures are of one device.

Shape letters: L layers, N tokens on one device, D width, n devices on the axis, S groups on one device, k choices per
token and group, C and Q slots per pair of devices (see `exchange_rows`), V vocabulary, H heads of experts, K size of a
sub-token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sharding.formulas import Op, ring_egress
from sharding.hlo import num_bytes

Rows = list[dict[str, Any]]


class Sizes(NamedTuple):
    """What all formulas need.

    Attributes:
      layers: L.
      tokens: N.
      width: D.
      dtype: of activations and weights, in HLO's words: bf16, f32 or f64.
    """

    layers: int
    tokens: int
    width: int
    dtype: str

    @property
    def wide(self) -> str:
        """The dtype of norms and router."""
        return "f64" if self.dtype == "f64" else "f32"

    def slice_of(self, devices: int) -> Sizes:
        """The sizes of a device that carries its slice of the tokens, padding included."""
        return self._replace(tokens=-(-self.tokens // devices))


def foe_rows(sizes: Sizes, devices: int, *, last: Literal["reduce-scatter", "all-reduce"], last_tokens: int) -> Rows:
    """One merge a layer over the `group` axis, and one more of the `last_tokens` whose logits are wanted."""
    whole, few = sizes.tokens * sizes.width, last_tokens * sizes.width
    return [
        _row("merge of the groups", "all-reduce", "group", devices, sizes.layers, "N D", whole, sizes.dtype),
        _row("last merge", last, "group", devices, 1, "N D", few, sizes.dtype),
    ]


def tp_rows(sizes: Sizes, devices: int) -> Rows:
    """Heads and experts over `group`, all tokens on every device: two sums a layer, and one of what QK-norm squares."""
    whole, layers = sizes.tokens * sizes.width, sizes.layers
    return [
        _row("sum after attention", "all-reduce", "group", devices, layers, "N D", whole, sizes.dtype),
        _row("sum after the experts", "all-reduce", "group", devices, layers, "N D", whole, sizes.dtype),
        _head_squares(sizes, devices),
    ]


def tp_ep_rows(sizes: Sizes, devices: int, *, last_tokens: int = 0) -> Rows:
    """The same heads with each device's slice of the tokens outside attention; the exchange is `exchange_rows`.

    Tokens are padded until they split into slices. The `last_tokens` whose logits all devices compute meet at the end.
    """
    layers, slice_elements = sizes.layers, sizes.slice_of(devices).tokens * sizes.width
    whole, last = devices * slice_elements, last_tokens * sizes.width
    rows = [
        _row("sum after attention", "reduce-scatter", "group", devices, layers, "N D", whole, sizes.dtype),
        _row("tokens to attention", "all-gather", "group", devices, layers, "N D / n", slice_elements, sizes.dtype),
        _head_squares(sizes, devices),
    ]
    return rows + ([_row("last tokens", "all-reduce", "group", devices, 1, "N D", last, sizes.dtype)] if last else [])


def hp_rows(sizes: Sizes, devices: int, *, latent_width: int, masked: bool) -> Rows:
    """Heads of experts over `group`: sub-tokens are exchanged before they are routed, and their outputs come back.

    Nothing here depends on the routing or on the number of chosen experts: every device sends every other the same.

    Args:
      latent_width: H K, all sub-tokens of a token.
      masked: whether devices tell each other which of their tokens are padding, as where that is not known beforehand.
    """
    elements, layers = sizes.tokens * latent_width, sizes.layers
    rows = [
        _row("sub-tokens to their heads", "all-to-all", "group", devices, layers, "N H K", elements, sizes.dtype),
        _row("outputs of the heads", "all-to-all", "group", devices, layers, "N H K", elements, sizes.dtype),
    ]
    return rows + ([_row("active tokens", "all-gather", "group", devices, 1, "N", sizes.tokens, "pred")] * masked)


def _head_squares(sizes: Sizes, devices: int) -> dict[str, Any]:
    what = "squares of queries and keys"
    return _row(what, "all-reduce", "group", devices, sizes.layers, "2 N", 2 * sizes.tokens, sizes.wide)


def vocab_row(sizes: Sizes, devices: int, vocab_size: int) -> Rows:
    """The head, split by vocabulary over `group`, gathered for logits of token slices."""
    elements = sizes.width * vocab_size // devices
    return [_row("head for all tokens", "all-gather", "group", devices, 1, "D V / n", elements, sizes.dtype)]


def exchange_rows(
    sizes: Sizes,
    devices: int,
    buffers: Sequence[tuple[int, int]],
    *,
    groups: int,
    experts_per_token: int,
    axis: str,
    needed: tuple[float, float] | None = None,
) -> Rows:
    """Dispatch and combine of every layer; where there are several buffer sizes, each is a branch of the program.

    Args:
      devices: n, those that share experts.
      buffers: slots (C, Q) per pair of devices, of tokens and of outputs, of each branch.
      groups: S.
      experts_per_token: k, in each group.
      axis: the mesh axis.
      needed: copies of a token that routing needs sent, dispatch and combine, beside what the buffers send.
    """
    layers, width, choices = sizes.layers, sizes.width, groups * experts_per_token
    useful = [None if needed is None else round(copies * sizes.tokens * width) for copies in needed or (0, 0)]
    rows = []
    for branch, (slots, back) in enumerate(buffers):
        parts = (
            ("tokens to their experts", "n C D", slots * width, sizes.dtype, useful[0]),
            ("their weights", "n C S k", slots * choices, sizes.wide, None),
            ("their expert indices", "n C S k", slots * choices, "s32", None),
            ("outputs to their tokens", "n Q D", back * width, sizes.dtype, useful[1]),
        )
        for what, formula, elements, dtype, useful_elements in parts:
            row = _row(what, "all-to-all", axis, devices, layers, formula, devices * elements, dtype)
            row |= {"branch": branch} if len(buffers) > 1 else {}
            if useful_elements is not None:
                row["useful_payload_bytes"] = num_bytes(dtype, useful_elements)
            rows.append(row)
    if len(buffers) > 1:
        rows.append(_row("choice of the buffers", "all-reduce", axis, devices, layers, "2", 2, "s32"))
    return rows


def compare_with_audit(expected: Iterable[Mapping[str, Any]], audited: Iterable[Mapping[str, Any]]) -> Rows:
    """Formula rows beside audited ones (`sharding.audit.summarize`), matched by op, axes, dtype, branch and payload.

    Returns:
      One row for each different collective: what, op, axes, formula, dtype, branch, payload_bytes and wire_bytes (of
      one execution, per device), expected_count, count, and useful_payload_bytes where a formula gives it. Collectives
      that no formula names come last, with an expected_count of 0.
    """
    found: Counter[tuple[Any, ...]] = Counter()
    unnamed: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in audited:
        found[_key(row)] += row["count"]
        unnamed[_key(row)] = row
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in expected:
        key = _key(row)
        unnamed.pop(key, None)
        if key in rows:
            rows[key]["what"] += f", {row['what']}"
            rows[key]["expected_count"] += row["count"]
        else:
            rows[key] = {**row, "branch": key[3], "expected_count": row["count"], "count": found[key]}
    for key, audited_row in unnamed.items():
        kept = {name: audited_row[name] for name in ("op", "axes", "dtype", "payload_bytes", "wire_bytes")}
        kept |= {"what": "in no formula", "formula": "", "branch": key[3]}
        rows[key] = kept | {"expected_count": 0, "count": found[key]}
    return list(rows.values())


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Op, axes, dtype, branch number (of the innermost conditional; None outside) and payload."""
    branch = row.get("branch")
    number = None if branch is None else int(str(branch).rpartition(":")[2])
    return row["op"], tuple(row["axes"]), row["dtype"], number, row["payload_bytes"]


def _row(
    what: str, op: Op, axis: str, devices: int, count: int, formula: str, elements: int, dtype: str
) -> dict[str, Any]:
    payload = num_bytes(dtype, elements)
    return {
        "what": what,
        "op": op,
        "axes": [axis],
        "count": count,
        "formula": formula,
        "payload_bytes": payload,
        "wire_bytes": round(ring_egress(op, payload, devices)),
        "dtype": dtype,
    }
