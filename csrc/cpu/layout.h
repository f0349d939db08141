// The page of index keys (misa_vllm/index_cache.py) and the tile that all CPU kernels share.
#pragma once

#include <stdint.h>

namespace misa {

constexpr int kDim = 128;
constexpr int kPageTokens = 64;
constexpr int kScalesOffset = kPageTokens * kDim;
constexpr int kMeanOffset = kScalesOffset + kPageTokens * 4;
constexpr float kHalfMax = 65504.0f;

// Keys are scored in chunks of three pages: a whole number of panels (3 vectors of 4, 8 or 16 keys) on every
// instruction set, and small enough that a chunk of fp32 keys (96 KiB) stays in the second-level cache.
constexpr int kChunkKeys = 3 * kPageTokens;

// Tokens whose latent vectors the attention widens to fp32 at a time.
constexpr int kAttentionTile = 24;

// Rows of fp32 vectors are padded to the widest vector.
constexpr int kMaxLanes = 16;
constexpr int kMaxPanelKeys = 3 * kMaxLanes;

}  // namespace misa
