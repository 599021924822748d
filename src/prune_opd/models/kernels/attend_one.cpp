// Attention of one query a row to the keys and values of its slot, in float32: see attend_one.py.
//
// The keys and values of a head are read once each and in the order they lie in memory, from the first column that the
// row sees to the last: decoding takes as long as memory needs to deliver them. General kernels reach half of that,
// since for them a single query is a matrix of one row.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

using Vec = at::vec::Vectorized<float>;

namespace {

constexpr int64_t LANES = Vec::size();
constexpr int64_t AHEAD = 16;  // columns that are asked of memory before their turn
constexpr int64_t LINE = 64 / sizeof(float);  // of a cache

float sum_of(Vec parts) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, parts);
}

template <int64_t SIZE>
void prefetch(const float* from) {
  for (int64_t i = 0; i < SIZE; i += LINE) __builtin_prefetch(from + i);
}

// softmax(scale · query keysᵀ) values over the columns that `seen` allows. The head size is known to the compiler, so
// that a query and its answer stay in registers.
template <int64_t HEAD_SIZE>
void attend(
    const float* query, const float* keys, const float* values, const uint8_t* seen, int64_t first, int64_t end,
    float scale, float* scores, float* out) {
  static_assert(HEAD_SIZE % LANES == 0);
  constexpr int64_t SIZE = HEAD_SIZE / LANES;  // in vectors
  Vec asked[SIZE], answer[SIZE];
  for (int64_t i = 0; i < SIZE; ++i) {
    asked[i] = Vec::loadu(query + i * LANES) * Vec(scale);
    answer[i] = Vec(0.f);
  }
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t column = first; column < end; ++column) {
    const float* key = keys + column * HEAD_SIZE;
    prefetch<HEAD_SIZE>(key + AHEAD * HEAD_SIZE);
    Vec product = asked[0] * Vec::loadu(key);
    for (int64_t i = 1; i < SIZE; ++i) product = at::vec::fmadd(asked[i], Vec::loadu(key + i * LANES), product);
    scores[column] = seen[column] ? sum_of(product) : -std::numeric_limits<float>::infinity();
    largest = std::max(largest, scores[column]);
  }
  Vec totals(0.f);
  int64_t column = first;
  for (; column + LANES <= end; column += LANES) {
    const Vec shares = (Vec::loadu(scores + column) - Vec(largest)).exp();
    shares.store(scores + column);
    totals = totals + shares;
  }
  float total = sum_of(totals);
  for (; column < end; ++column) {
    scores[column] = std::exp(scores[column] - largest);
    total += scores[column];
  }
  for (column = first; column < end; ++column) {
    const float* value = values + column * HEAD_SIZE;
    prefetch<HEAD_SIZE>(value + AHEAD * HEAD_SIZE);
    const Vec share(scores[column]);
    for (int64_t i = 0; i < SIZE; ++i) answer[i] = at::vec::fmadd(share, Vec::loadu(value + i * LANES), answer[i]);
  }
  for (int64_t i = 0; i < SIZE; ++i) (answer[i] / Vec(total)).store(out + i * LANES);
}

}  // namespace

// query, out (rows, shared · group, size) without gaps; keys and values (rows, shared, length, size), whose strides of
// rows and heads are given; seen (rows, length). Returns whether there is code for this head size.
extern "C" bool attend_one(
    const float* query, const float* keys, const float* values, const uint8_t* seen, float* out, int64_t rows,
    int64_t shared, int64_t group, int64_t length, int64_t size, int64_t row_stride, int64_t head_stride,
    float scale) {
  auto* attend_head = &attend<16>;
  switch (size) {
    case 16: break;
    case 32: attend_head = &attend<32>; break;
    case 64: attend_head = &attend<64>; break;
    case 80: attend_head = &attend<80>; break;
    case 96: attend_head = &attend<96>; break;
    case 128: attend_head = &attend<128>; break;
    case 256: attend_head = &attend<256>; break;
    default: return false;
  }
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t stop) {
    std::vector<float> scores(length);
    for (int64_t row = begin; row < stop; ++row) {
      const uint8_t* row_seen = seen + row * length;
      const int64_t first = std::find(row_seen, row_seen + length, 1) - row_seen;
      int64_t end = length;
      while (end > first && !row_seen[end - 1]) --end;
      for (int64_t head = 0; head < shared * group; ++head) {
        const int64_t asked = (row * shared * group + head) * size;
        const int64_t stored = row * row_stride + head / group * head_stride;
        attend_head(
            query + asked, keys + stored, values + stored, row_seen, first, end, scale, scores.data(), out + asked);
      }
    }
  });
  return true;
}
