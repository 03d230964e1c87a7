// The output tiles of a grouped matrix product, found on the device: groups of rows, each with a matrix of its own.
//
// offsets (E) int32: group e holds the rows offsets[e-1] .. offsets[e]. Whatever offsets hold, a tile stays inside the
// rows there are. Nothing is read back by the host: a grid of a few blocks per multiprocessor walks the tiles.
#pragma once

#include <device/warp.cuh>

namespace grokkernels::device {

struct Group {
  int begin, end;
};

GK_DEVICE Group group_of(const int32_t* offsets, int64_t e, int rows) {
  const auto inside = [rows](int row) { return row < 0 ? 0 : row > rows ? rows : row; };
  const int begin = e == 0 ? 0 : inside(offsets[e - 1]), end = inside(offsets[e]);
  return {begin, end > begin ? end : begin};
}

// Where the last group ends.
GK_DEVICE int rows_used(const int32_t* offsets, int64_t groups, int rows) {
  return groups == 0 ? 0 : group_of(offsets, groups - 1, rows).end;
}

inline constexpr int kBandTiles = 8;

// Rows row .. row + the tile's rows of a group, `end` at most; the column of tiles.
struct GroupTile {
  int group, row, end, across;
};

// The tiles, kTileRows rows each and `across` of them side by side, are numbered group by group, within a group in
// bands of kBandTiles rows of tiles and column by column in a band, so that blocks at work together share rows and
// columns.
template <int kTileRows>
struct GroupTiles {
  const int32_t* offsets;
  int groups, rows, across;

  // Tile number `index`; false when there are fewer. All lanes of a warp call together. Nothing is kept from call to
  // call: the registers belong to the product.
  GK_DEVICE bool find(unsigned index, GroupTile& tile) const {
    if (across == 0) return false;
    const int lane = lane_id() & 31;
    unsigned before = 0;                                // tiles of the groups before `first`
    for (int first = 0; first < groups; first += 32) {  // 32 groups at a time, one to a lane
      const Group mine = first + lane < groups ? group_of(offsets, first + lane, rows) : Group{0, 0};
      const unsigned tiles =
          static_cast<unsigned>((mine.end - mine.begin + kTileRows - 1) / kTileRows) * static_cast<unsigned>(across);
      unsigned upto = tiles;
#pragma unroll
      for (unsigned delta = 1; delta < 32; delta *= 2) {
        const unsigned below = shuffle_up(upto, delta);
        if (lane >= static_cast<int>(delta)) upto += below;
      }
      const uint32_t later = ballot(index < before + upto);
      if (later != 0) {
        const int owner = 32 - count_bits(later);
        const int height = static_cast<int>(shuffle(tiles, owner)) / across;
        const int local = static_cast<int>(index - before - shuffle(upto - tiles, owner));
        const int band = local / (kBandTiles * across) * kBandTiles;
        const int in_band = height - band < kBandTiles ? height - band : kBandTiles;
        const int rest = local - band * across;
        tile.group = first + owner;
        tile.row = shuffle(mine.begin, owner) + (band + rest % in_band) * kTileRows;
        tile.end = shuffle(mine.end, owner);
        tile.across = rest / in_band;
        return true;
      }
      before += shuffle(upto, 31);
    }
    return false;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Host: the blocks to launch for at most `tiles` tiles, `per_multiprocessor` of which fit one.
inline unsigned persistent_blocks(int64_t tiles, int per_multiprocessor) {
  const int64_t most = int64_t{device_multiprocessors()} * per_multiprocessor;
  return static_cast<unsigned>(tiles < most ? tiles : most);
}

// Host: the most tiles that groups of `rows` rows in all can have.
inline int64_t most_group_tiles(int64_t rows, int64_t groups, int64_t tile_rows, int64_t across) {
  return (rows / tile_rows + (groups < rows ? groups : rows)) * across;
}

}  // namespace grokkernels::device
