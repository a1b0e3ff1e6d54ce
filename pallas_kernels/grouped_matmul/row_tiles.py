"""Row tiles: how sorted rows are cut into pieces of one expert each, computed on the device from the group sizes.

Shape letters: R rows, E experts, L listed tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowTiles(NamedTuple):
    """Tiles in order of rows; only the first `num_live` entries are in use, the others hold no rows.

    Attributes:
      experts: int32 [L]; E for a tile of rows past the last group, listed on request.
      firsts: int32 [L], first row to load; a multiple of the alignment, and at most R - height.
      starts: int32 [L], first row that belongs to the tile.
      stops: int32 [L], one past its last row; equal to `starts` in entries not in use.
      num_live: int32 scalar.
    """

    experts: jax.Array
    firsts: jax.Array
    starts: jax.Array
    stops: jax.Array
    num_live: jax.Array


def list_row_tiles(
    group_sizes_E: jax.Array, num_rows: int, height: int, *, alignment: int = 1, with_padding: bool = False
) -> RowTiles:
    """Cuts every group into tiles of `height` rows, counted from the aligned row at or before its first one.

    A tile near the end loads earlier rows as well, rather than rows past the end of the array.

    Args:
      group_sizes_E: int32; a sum above R is cut off at R.
      num_rows: R, at least `height`; with `height` a multiple of `alignment`.
      with_padding: also list the rows past the last group, as expert E.
    """
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), num_rows)
    if with_padding:
        ends_E = jnp.append(ends_E, jnp.int32(num_rows))
    starts_E = jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E[:-1]])
    bases_E = starts_E // alignment * alignment
    tiles_E = jnp.where(ends_E > starts_E, (ends_E - bases_E + (height - 1)) // height, 0)
    tile_ends_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    groups = ends_E.shape[0]
    # A group of n rows has at most (n + alignment - 2) // height + 1 tiles, and at most one group per row has any.
    owners = min(groups, num_rows)
    tile_L = jnp.arange((num_rows + owners * max(alignment - 2, 0)) // height + owners, dtype=jnp.int32)
    live_L = tile_L < tile_ends_E[-1]
    group_L = jnp.minimum((tile_L[:, None] >= tile_ends_E[None, :]).sum(1, dtype=jnp.int32), groups - 1)
    base_L = bases_E[group_L] + (tile_L - (tile_ends_E - tiles_E)[group_L]) * height
    start_L = jnp.maximum(base_L, starts_E[group_L])
    stop_L = jnp.where(live_L, jnp.minimum(base_L + height, ends_E[group_L]), start_L)
    return RowTiles(group_L, jnp.minimum(base_L, num_rows - height), start_L, stop_L, tile_ends_E[-1])
