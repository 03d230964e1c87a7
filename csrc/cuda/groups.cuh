// The output tiles of a grouped matrix product, found on the device: groups of rows, each with a matrix of its own.
//
// offsets (E) int32: group e holds the rows offsets[e-1] .. offsets[e]. Whatever offsets hold, a tile stays inside the
// rows there are. Nothing is read back by the host: a grid of a few blocks per multiprocessor walks the tiles.
#pragma once

#include <device/warp.cuh>

namespace grokkernels::device {

struct Group {
  int64_t begin, end;
};

GK_DEVICE Group group_of(const int32_t* offsets, int64_t e, int64_t rows) {
  const auto inside = [rows](int64_t row) { return row < 0 ? int64_t{0} : row > rows ? rows : row; };
  const int64_t begin = e == 0 ? 0 : inside(offsets[e - 1]);
  const int64_t end = inside(offsets[e]);
  return {begin, end > begin ? end : begin};
}

// Where the last group ends.
GK_DEVICE int64_t rows_used(const int32_t* offsets, int64_t groups, int64_t rows) {
  return groups == 0 ? 0 : group_of(offsets, groups - 1, rows).end;
}

inline constexpr int kBandTiles = 8;

// Tile by tile of `tile_rows` rows, `across` of them side by side. Numbered group by group, within a group in bands of
// kBandTiles rows of tiles and column by column in a band, so that blocks at work together share rows and columns.
struct GroupTile {
  int64_t group, row, end, across;  // rows row .. row + tile_rows, the group's end at most; the column of tiles
};

class GroupTiles {
 public:
  GK_DEVICE GroupTiles(const int32_t* offsets, int64_t groups, int64_t rows, int tile_rows, int64_t across)
      : offsets_(offsets), groups_(groups), rows_(rows), across_(across), tile_rows_(tile_rows) {}

  // Tile number `index`; false when there are fewer. From call to call index rises. All lanes of a warp call together.
  GK_DEVICE bool find(int64_t index, GroupTile& tile) {
    if (across_ == 0) return false;
    const int lane = lane_id();
    for (; first_ < groups_; first_ += 32) {  // 32 groups at a time, one to a lane
      const Group mine = first_ + lane < groups_ ? group_of(offsets_, first_ + lane, rows_) : Group{0, 0};
      const int64_t down = (mine.end - mine.begin + tile_rows_ - 1) / tile_rows_;
      int64_t upto = down;
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const int64_t below = shuffle_up(upto, static_cast<unsigned>(delta));
        if (lane >= delta) upto += below;
      }
      const uint32_t later = ballot(index < (before_ + upto) * across_);
      if (later != 0) {
        const int owner = 32 - count_bits(later);
        const int64_t height = shuffle(down, owner);
        const int64_t local = index - (before_ + shuffle(upto, owner) - height) * across_;
        const int64_t band = local / (kBandTiles * across_) * kBandTiles;
        const int64_t in_band = height - band < kBandTiles ? height - band : kBandTiles;
        tile.group = first_ + owner;
        tile.end = shuffle(mine.end, owner);
        const int64_t rest = local - band * across_;
        tile.row = shuffle(mine.begin, owner) + (band + rest % in_band) * tile_rows_;
        tile.across = rest / in_band;
        return true;
      }
      before_ += shuffle(upto, 31);
    }
    return false;
  }

 private:
  const int32_t* offsets_;
  int64_t groups_, rows_, across_, first_ = 0, before_ = 0;
  int tile_rows_;
};

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
