// Attention of the heads that are on, for CPUs: FlashAttention's tiling over gathered queries.
//
// A row is a query token under one of the query heads that share a key head; every (batch, key
// head) has a list of the rows that are on, ascending. Blocks of a list are computed side by side.
// Matrix products are oneDNN's, through torch; bfloat16 is multiplied as such and summed in float32.
//
// Sources: MoH, arXiv 2410.11842, Eq. 4; FlashAttention, arXiv 2205.14135 and 2307.08691.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t ROWS = 64;  // of a block
constexpr int64_t KEYS = 256;  // of a step
// Products compile for each size that they see; multiples keep those few.
constexpr int64_t ROW_MULTIPLE = 32, KEY_MULTIPLE = 64;
constexpr float LOG2E = 1.4426950408889634f;

// Uninitialised, unlike a vector: kernels write before they read.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> values;
  explicit Buffer(int64_t size) : values(new T[size]) {}
  T* data() { return values.get(); }
  T& operator[](int64_t i) { return values[i]; }
};

template <typename T>
constexpr bool HALF = std::is_same_v<T, BFloat16>;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 2^x for x <= 0, by a series that vectorises: within roundings, where halves follow within 3e-6.
template <typename T>
inline float exp2_of(float x) {
  x = x < -126.0f ? -126.0f : x;
  const float whole = std::nearbyintf(x), f = x - whole;
  // ln(2)^n / n! from n = 7 or 5 down.
  float p = HALF<T> ? 0.0f : 1.5252733804e-5f * f + 1.5403530393e-4f;
  p = p * f + 1.3333558146e-3f;
  p = p * f + 9.6181291076e-3f;
  p = p * f + 5.5504108665e-2f;
  p = p * f + 2.4022650696e-1f;
  p = p * f + 6.9314718056e-1f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
void store(T* out, const float* in, int64_t n) {
  if constexpr (HALF<T>) {
    auto* half = reinterpret_cast<uint16_t*>(out);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = nearest_bf16(in[i]);
  } else {
    std::memcpy(out, in, n * sizeof(float));
  }
}

// The second operand of a product, B [rows, columns]. bfloat16 hardware wants pairs of rows
// interleaved, [rows / 2][columns][2]; float32 is taken as it is. Rows from `count` on are 0.
template <typename T>
void pack(T* out, const T* in, int64_t stride, int64_t count, int64_t rows, int64_t columns) {
  if constexpr (HALF<T>) {
    auto* pairs = reinterpret_cast<uint16_t*>(out);
    const auto* source = reinterpret_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < columns; ++j) {
        pairs[i * columns + 2 * j] = i < count ? source[i * stride + j] : 0;
        pairs[i * columns + 2 * j + 1] = i + 1 < count ? source[(i + 1) * stride + j] : 0;
      }
  } else {
    for (int64_t i = 0; i < rows; ++i)
      if (i < count)
        std::memcpy(out + i * columns, in + i * stride, columns * sizeof(T));
      else
        std::memset(out + i * columns, 0, columns * sizeof(T));
  }
}

// The same for the transpose of `in` [count, channels]: B [channels, columns]. A transposition of
// words of 32 bits, be they a float or a pair of halves.
template <typename T>
void pack_transposed(
    T* out, const T* in, int64_t stride, int64_t count, int64_t columns, int64_t channels) {
  constexpr int64_t each = HALF<T> ? 2 : 1;
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t j0 = 0; j0 < channels / each; j0 += 16)
    for (int64_t i = 0; i < columns; ++i) {
      const auto* row = reinterpret_cast<const uint32_t*>(in + i * stride);
      for (int64_t j = j0; j < std::min(j0 + 16, channels / each); ++j)
        words[j * columns + i] = i < count ? row[j] : 0;
    }
}

template <typename T>
void multiply(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, HALF<T>);
}

struct Sizes {
  int64_t batch, queries, heads, channels, keys, key_heads, group, offset;
  bool causal;

  Sizes(const Tensor& q, const Tensor& k, bool causal)
      : batch(q.size(0)), queries(q.size(1)), heads(q.size(2)), channels(q.size(3)),
        keys(k.size(1)), key_heads(k.size(2)), group(heads / key_heads), offset(keys - queries),
        causal(causal) {}

  int64_t lists() const { return batch * key_heads; }
  int64_t steps() const { return (keys + KEYS - 1) / KEYS; }
  // The last key that a row sees.
  int64_t limit(int32_t row) const { return causal ? row / group + offset : keys - 1; }
  // Where a row of a list stands in [B, T, H].
  int64_t place(int64_t list, int32_t row) const {
    return (list / key_heads * queries + row / group) * heads + list % key_heads * group +
        row % group;
  }
};

std::vector<std::vector<int32_t>> rows_that_are_on(const Sizes& z, const float* gates) {
  std::vector<std::vector<int32_t>> lists(z.lists());
  at::parallel_for(0, z.lists(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list)
      for (int32_t row = 0; row < z.queries * z.group; ++row)
        if (gates[z.place(list, row)] != 0 && z.limit(row) >= 0) lists[list].push_back(row);
  });
  return lists;
}

// Calls work(i) for every i below count; threads take the next one when they are done.
template <typename Work>
void share_out(int64_t count, const Work& make_worker) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t i; (i = next++) < count;) work(i);
    at::native::cpublas::brgemm_release();
  });
}

// Keys or values [B, S, Hkv, C] of one list.
template <typename T>
const T* of_list(const Tensor& x, const Sizes& z, int64_t list) {
  return x.const_data_ptr<T>() + list / z.key_heads * x.stride(0) + list % z.key_heads * x.stride(2);
}

template <typename T>
void forward_rows(
    const Sizes& z, const Tensor& q, const Tensor& gate, const T* packed_k, const T* packed_v,
    int64_t list, const int32_t* rows, int64_t count, float scale, Tensor& y, Tensor& lse,
    float* s, T* p, T* q_rows, float* out) {
  const int64_t c = z.channels, padded = round_up(count, ROW_MULTIPLE);
  float peak[ROWS], total[ROWS];
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(
        q_rows + r * c, q.const_data_ptr<T>() + z.place(list, rows[r]) * c, c * sizeof(T));
    peak[r] = -INFINITY, total[r] = 0;
  }
  std::fill(out, out + padded * c, 0.0f);
  const int64_t end = z.limit(rows[count - 1]) + 1;
  for (int64_t first = 0; first < end; first += KEYS) {
    const int64_t width = std::min(KEYS, round_up(end - first, KEY_MULTIPLE));
    multiply(padded, width, c, q_rows, c, packed_k + first * c, KEYS, s, KEYS, false);
    for (int64_t r = 0; r < count; ++r) {
      float* scores = s + r * KEYS;
      T* weights = HALF<T> ? p + r * KEYS : reinterpret_cast<T*>(scores);
      const int64_t seen = std::clamp<int64_t>(z.limit(rows[r]) + 1 - first, 0, width);
      float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < seen; ++j) top = scores[j] > top ? scores[j] : top;
      if (seen > 0) {
        top = std::max(peak[r], top * scale);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < seen; ++j) {
          const float weight = exp2_of<T>(scores[j] * scale - top);
          sum += weight;
          if constexpr (HALF<T>)
            reinterpret_cast<uint16_t*>(weights)[j] = nearest_bf16(weight);
          else
            scores[j] = weight;
        }
        const float decay = std::exp2(peak[r] - top);
        total[r] = total[r] * decay + sum, peak[r] = top;
        if (decay != 1)
          for (int64_t j = 0; j < c; ++j) out[r * c + j] *= decay;
      }
      std::memset(static_cast<void*>(weights + seen), 0, (width - seen) * sizeof(T));
    }
    const T* weights = HALF<T> ? p : reinterpret_cast<const T*>(s);
    multiply(padded, c, width, weights, KEYS, packed_v + first * c, c, out, c, true);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = z.place(list, rows[r]);
    // Not times gate / total: its rounding would be that of the whole row.
    const float weight = gate.const_data_ptr<float>()[place];
    for (int64_t j = 0; j < c; ++j) out[r * c + j] = weight * (out[r * c + j] / total[r]);
    store(y.mutable_data_ptr<T>() + place * c, out + r * c, c);
    lse.mutable_data_ptr<double>()[place] = peak[r] + std::log2(static_cast<double>(total[r]));
  }
}

template <typename T>
void forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal, float scale,
    Tensor& y, Tensor& lse) {
  const Sizes z(q, k, causal);
  const int64_t c = z.channels, of_a_list = z.steps() * KEYS * c;
  const auto lists = rows_that_are_on(z, gate.const_data_ptr<float>());
  std::vector<std::tuple<int64_t, int64_t>> blocks;
  // Later rows see more keys: the longest work starts first.
  for (int64_t first = round_up(z.queries * z.group, ROWS); (first -= ROWS) >= 0;)
    for (int64_t list = 0; list < z.lists(); ++list)
      if (first < static_cast<int64_t>(lists[list].size())) blocks.emplace_back(list, first);
  const Tensor packed = at::empty({2, z.lists() * of_a_list}, q.options());
  T* packed_k = packed.mutable_data_ptr<T>();
  T* packed_v = packed_k + z.lists() * of_a_list;
  at::parallel_for(0, z.lists() * z.steps(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t list = i / z.steps(), first = i % z.steps() * KEYS, n = z.keys - first;
      if (lists[list].empty()) continue;
      const T* keys = of_list<T>(k, z, list) + first * k.stride(1);
      const T* values = of_list<T>(v, z, list) + first * v.stride(1);
      pack_transposed(packed_k + i * KEYS * c, keys, k.stride(1), n, KEYS, c);
      pack(packed_v + i * KEYS * c, values, v.stride(1), n, KEYS, c);
    }
  });
  share_out(static_cast<int64_t>(blocks.size()), [&] {
    return [&, s = Buffer<float>(ROWS * KEYS), p = Buffer<T>(HALF<T> ? ROWS * KEYS : 0),
            q_rows = Buffer<T>(ROWS * c), out = Buffer<float>(ROWS * c)](int64_t i) mutable {
      const auto [list, first] = blocks[i];
      const auto& rows = lists[list];
      const int64_t count = std::min<int64_t>(ROWS, rows.size() - first);
      forward_rows<T>(
          z, q, gate, packed_k + list * of_a_list, packed_v + list * of_a_list, list,
          rows.data() + first, count, scale * LOG2E, y, lse, s.data(), p.data(), q_rows.data(),
          out.data());
    };
  });
}

// What a thread needs for the backward of a block, everything transposed: [keys, rows].
template <typename T>
struct Scratch {
  Buffer<float> s, dp, dq, dk, dv;
  Buffer<T> p, ds, ds_packed, q, dout, q_packed, dout_packed, q_transposed, dout_transposed;
  Buffer<T> k_transposed;

  explicit Scratch(const Sizes& z)
      : s(KEYS * ROWS), dp(KEYS * ROWS), dq(ROWS * z.channels), dk(z.keys * z.channels),
        dv(z.keys * z.channels), p(KEYS * ROWS), ds(KEYS * ROWS), ds_packed(KEYS * ROWS),
        q(ROWS * z.channels), dout(ROWS * z.channels), q_packed(ROWS * z.channels),
        dout_packed(ROWS * z.channels), q_transposed(ROWS * z.channels),
        dout_transposed(ROWS * z.channels), k_transposed(z.channels * round_up(z.keys, 2)) {}
};

struct Operands {
  const Tensor &dy, &q, &k, &v, &gate, &y, &lse;
  float scale;
  Tensor &dq, &dgate;
};

template <typename T>
void backward_rows(
    const Sizes& z, const Operands& x, int64_t list, const int32_t* rows, int64_t count,
    Scratch<T>& w) {
  const int64_t c = z.channels, padded = round_up(count, ROW_MULTIPLE);
  // A float's rounding of lse would be that of all weights of a row: what it cuts off is kept.
  float lse[ROWS] = {}, cut_off[ROWS] = {}, delta[ROWS] = {}, row[1024];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = z.place(list, rows[r]);
    const T *dy = x.dy.const_data_ptr<T>() + place * c, *y = x.y.const_data_ptr<T>() + place * c;
    const float gate = x.gate.const_data_ptr<float>()[place];
    for (int64_t j = 0; j < c; ++j) {
      row[j] = gate * static_cast<float>(dy[j]);
      delta[r] += static_cast<float>(dy[j]) * static_cast<float>(y[j]);
    }
    store(w.dout.data() + r * c, row, c);
    std::memcpy(
        w.q.data() + r * c, x.q.const_data_ptr<T>() + place * c, c * sizeof(T));
    const double exact = x.lse.const_data_ptr<double>()[place];
    lse[r] = static_cast<float>(exact), cut_off[r] = static_cast<float>(exact - lse[r]);
    x.dgate.mutable_data_ptr<float>()[place] = delta[r] / gate;
  }
  pack(w.q_packed.data(), w.q.data(), c, count, padded, c);
  pack(w.dout_packed.data(), w.dout.data(), c, count, padded, c);
  pack_transposed(w.q_transposed.data(), w.q.data(), c, count, padded, c);
  pack_transposed(w.dout_transposed.data(), w.dout.data(), c, count, padded, c);
  std::fill_n(w.dq.data(), padded * c, 0.0f);
  const T *k = of_list<T>(x.k, z, list), *v = of_list<T>(x.v, z, list);
  const int64_t end = z.limit(rows[count - 1]) + 1, ks = x.k.stride(1), vs = x.v.stride(1);
  const float to_log2 = x.scale * LOG2E;
  for (int64_t first = 0; first < end; first += KEYS) {
    const int64_t width =
        std::min({KEYS, round_up(end - first, KEY_MULTIPLE), z.keys - first});
    multiply(
        width, padded, c, k + first * ks, ks, w.q_transposed.data(), padded, w.s.data(), padded,
        false);
    multiply(
        width, padded, c, v + first * vs, vs, w.dout_transposed.data(), padded, w.dp.data(), padded,
        false);
    // Rows ascend, so those that see a key are the last ones.
    int64_t seeing = 0;
    for (int64_t j = 0; j < width; ++j) {
      while (seeing < count && z.limit(rows[seeing]) < first + j) ++seeing;
      float *s = w.s.data() + j * padded, *dp = w.dp.data() + j * padded;
      for (int64_t r = 0; r < seeing; ++r) s[r] = 0, dp[r] = 0;
#pragma omp simd
      for (int64_t r = seeing; r < count; ++r) {
        s[r] = exp2_of<T>(s[r] * to_log2 - lse[r] - cut_off[r]);
        dp[r] = s[r] * (dp[r] - delta[r]);
      }
      for (int64_t r = count; r < padded; ++r) s[r] = 0, dp[r] = 0;
      if constexpr (HALF<T>) {
        store(w.p.data() + j * padded, s, padded);
        store(w.ds.data() + j * padded, dp, padded);
      }
    }
    const T* p = HALF<T> ? w.p.data() : reinterpret_cast<const T*>(w.s.data());
    const T* ds = HALF<T> ? w.ds.data() : reinterpret_cast<const T*>(w.dp.data());
    multiply(width, c, padded, p, padded, w.dout_packed.data(), c, w.dv.data() + first * c, c, true);
    multiply(width, c, padded, ds, padded, w.q_packed.data(), c, w.dk.data() + first * c, c, true);
    const int64_t even = round_up(width, 2);
    if constexpr (HALF<T>) pack(w.ds_packed.data(), ds, padded, width, even, padded);
    multiply(
        c, padded, HALF<T> ? even : width, w.k_transposed.data() + first, round_up(z.keys, 2),
        HALF<T> ? w.ds_packed.data() : ds, padded, w.dq.data(), padded, true);
  }
  T* dq = x.dq.mutable_data_ptr<T>();
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < c; ++j) row[j] = x.scale * w.dq[j * padded + r];
    store(dq + z.place(list, rows[r]) * c, row, c);
  }
}

// [count, channels] to [channels, columns], 0 from `count` on.
template <typename T>
void transpose(
    T* out, const T* in, int64_t stride, int64_t count, int64_t columns, int64_t channels) {
  for (int64_t j0 = 0; j0 < channels; j0 += 16)
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t j = j0; j < std::min(j0 + 16, channels); ++j)
        out[j * columns + i] = i < count ? in[i * stride + j] : T(0);
}

// Adds what one thread found for a list to dk or dv [B, S, Hkv, C].
template <typename T>
void add_to(Tensor& out, const Sizes& z, int64_t list, float* sums, float factor) {
  for (int64_t j = 0; j < z.keys; ++j) {
    T* row = out.mutable_data_ptr<T>() +
        ((list / z.key_heads * z.keys + j) * z.key_heads + list % z.key_heads) * z.channels;
    float* sum = sums + j * z.channels;
    for (int64_t i = 0; i < z.channels; ++i)
      sum[i] = factor * sum[i] + static_cast<float>(row[i]);
    store(row, sum, z.channels);
  }
}

template <typename T>
void backward(const Operands& x, bool causal, Tensor& dk, Tensor& dv) {
  const Sizes z(x.q, x.k, causal);
  const auto lists = rows_that_are_on(z, x.gate.const_data_ptr<float>());
  // Only where there are fewer lists than threads do threads share one.
  const int64_t parts = std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(1, z.lists()));
  std::vector<std::mutex> locks(z.lists());
  share_out(z.lists() * parts, [&] {
    return [&, w = Scratch<T>(z)](int64_t i) mutable {
      const int64_t list = i / parts, part = i % parts;
      const auto& rows = lists[list];
      const int64_t size = static_cast<int64_t>(rows.size());
      if (part * ROWS >= size) return;
      std::fill_n(w.dk.data(), z.keys * z.channels, 0.0f);
      std::fill_n(w.dv.data(), z.keys * z.channels, 0.0f);
      transpose(
          w.k_transposed.data(), of_list<T>(x.k, z, list), x.k.stride(1), z.keys,
          round_up(z.keys, 2), z.channels);
      for (int64_t first = part * ROWS; first < size; first += parts * ROWS)
        backward_rows<T>(
            z, x, list, rows.data() + first, std::min(ROWS, size - first), w);
      const std::lock_guard<std::mutex> lock(locks[list]);
      add_to<T>(dk, z, list, w.dk.data(), x.scale);
      add_to<T>(dv, z, list, w.dv.data(), 1);
    };
  });
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal,
    double scale) {
  Tensor y = at::zeros(q.sizes(), q.options()), lse;
  lse = at::zeros(gate.sizes(), gate.options().dtype(at::kDouble));
  if (q.scalar_type() == at::kFloat)
    forward<float>(q, k, v, gate, causal, scale, y, lse);
  else
    forward<BFloat16>(q, k, v, gate, causal, scale, y, lse);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
    const Tensor& y, const Tensor& lse, bool causal, double scale) {
  Tensor dq = at::zeros(q.sizes(), q.options()), dgate = at::zeros(gate.sizes(), gate.options());
  Tensor dk = at::zeros(k.sizes(), k.options()), dv = at::zeros(v.sizes(), v.options());
  const Operands x{dy, q, k, v, gate, y, lse, static_cast<float>(scale), dq, dgate};
  if (q.scalar_type() == at::kFloat)
    backward<float>(x, causal, dk, dv);
  else
    backward<BFloat16>(x, causal, dk, dv);
  return {dq, dk, dv, dgate};
}

}  // namespace

TORCH_LIBRARY(headwise_native, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor y, "
      "Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(headwise_native, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}
