// The product of activations with a packed ternary matrix, y (M, n) = x (M, m) (scale * code), as an XLA custom call.
//
// The matrix is in spans of 256 inputs of one output: 64 bytes, codes (-2 to 1) plus 2 in 2 bits,
//
//     byte b of the span, bits   7 6 | 5 4 | 3 2 | 1 0
//     input of the span       192 + b | 128 + b | 64 + b | b
//
// so that one shift and one "and" of a register give the codes of 16, 32 or 64 neighbouring inputs, whatever its width.
// Four outputs make a row: span 0 of each of the four, span 1 of each, and so on. A thread reads memory in order.
//
// Activations become whole numbers of one step per block of inputs, each written in one or two digits of 8 bits,
// x = step (128 high + low); a digit is one more row of int8. The processor multiplies unsigned codes with signed
// digits and adds in int32, without rounding; as codes are stored plus 2, the sum of the block's activations is taken
// off twice. So all paths give the same bits.
//
// XLA's own threads claim the work in chunks. The caller computes what nobody has claimed and never waits for a thread
// that has not begun, so callers that occupy all threads cannot block each other.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kSpan = 256, kSpanBytes = 64;  // inputs, and the bytes that hold them
constexpr int64_t kOutputs = 4;                  // of a tile
constexpr int64_t kDigitRows = 6;                // of a tile, at most: 24 sums in 32 registers
constexpr int64_t kBlock = 1024;                 // inputs that share a step where there is one digit
constexpr int64_t kLargestBlock = 65536;         // 2 * 127 * 128 * 65536 < 2^31
constexpr int64_t kChunkBytes = 1 << 16;         // of the matrix, for a thread at a time
constexpr int64_t kAhead = 4096;                 // bytes from what is read to what is prefetched

// ---- Tiles: sums over spans of (code + 2) digit, for 4 outputs and X rows of digits, `stride` apart. ----

using Tile = void (*)(const uint8_t* w, const int8_t* x, int64_t stride, int64_t spans, int32_t out[][kOutputs]);

template <int X>
void PlainTile(const uint8_t* w, const int8_t* x, int64_t stride, int64_t spans, int32_t out[][kOutputs]) {
  int32_t sums[X][kOutputs] = {};
  for (int64_t s = 0; s < spans; ++s) {
    for (int r = 0; r < kOutputs; ++r) {
      const uint8_t* span = w + (s * kOutputs + r) * kSpanBytes;
      int8_t codes[kSpan];
      for (int j = 0; j < 4; ++j) {
        for (int b = 0; b < kSpanBytes; ++b) codes[j * kSpanBytes + b] = span[b] >> 2 * j & 3;
      }
      for (int i = 0; i < X; ++i) {
        int32_t sum = 0;
        for (int k = 0; k < kSpan; ++k) sum += int32_t{codes[k]} * int32_t{x[i * stride + s * kSpan + k]};
        sums[i][r] += sum;
      }
    }
  }
  std::memcpy(out, sums, sizeof(sums));
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// The sums of the lanes of four registers.
AVX2 INLINE __m128i Lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  const __m256i all = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

AVX2 INLINE void Prefetch(const uint8_t* w) {
  for (int r = 0; r < kOutputs; ++r) {
    _mm_prefetch(reinterpret_cast<const char*>(w + r * kSpanBytes + kAhead), _MM_HINT_T0);
  }
}

// A quarter J of half a span.
template <int X, int J>
AVX2 INLINE void Add(__m256i (&sums)[X][kOutputs], const uint8_t* w, const int8_t* x, int64_t stride) {
  __m256i codes[kOutputs];
  for (int r = 0; r < kOutputs; ++r) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + r * kSpanBytes));
    codes[r] = _mm256_and_si256(_mm256_srli_epi16(packed, 2 * J), _mm256_set1_epi8(3));
  }
  for (int i = 0; i < X; ++i) {
    const __m256i digits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * stride + J * kSpanBytes));
    for (int r = 0; r < kOutputs; ++r) {
      sums[i][r] = _mm256_add_epi16(sums[i][r], _mm256_maddubs_epi16(codes[r], digits));
    }
  }
}

// Sums of 16 bits hold 4 spans: 2 halves, 4 quarters and 2 products of at most 3 * 128 each make 24576.
template <int X>
AVX2 void Avx2Tile(const uint8_t* w, const int8_t* x, int64_t stride, int64_t spans, int32_t out[][kOutputs]) {
  __m256i totals[X][kOutputs];
  for (auto& row : totals) std::fill_n(row, kOutputs, _mm256_setzero_si256());
  for (int64_t s = 0; s < spans;) {
    __m256i sums[X][kOutputs];
    for (auto& row : sums) std::fill_n(row, kOutputs, _mm256_setzero_si256());
    for (const int64_t stop = std::min(spans, s + 4); s < stop; ++s, w += kOutputs * kSpanBytes, x += kSpan) {
      for (int half = 0; half < 64; half += 32) {
        Add<X, 0>(sums, w + half, x + half, stride);
        Add<X, 1>(sums, w + half, x + half, stride);
        Add<X, 2>(sums, w + half, x + half, stride);
        Add<X, 3>(sums, w + half, x + half, stride);
      }
      Prefetch(w);
    }
    for (int i = 0; i < X; ++i) {
      for (int r = 0; r < kOutputs; ++r) {
        totals[i][r] = _mm256_add_epi32(totals[i][r], _mm256_madd_epi16(sums[i][r], _mm256_set1_epi16(1)));
      }
    }
  }
  for (int i = 0; i < X; ++i) {
    const __m128i four = Lanes(totals[i][0], totals[i][1], totals[i][2], totals[i][3]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i]), four);
  }
}

// A quarter J of a span.
template <int X, int J>
AVX512 INLINE void Add(__m512i (&sums)[X][kOutputs], const uint8_t* w, const int8_t* x, int64_t stride) {
  __m512i codes[kOutputs];
  for (int r = 0; r < kOutputs; ++r) {
    const __m512i packed = _mm512_loadu_si512(w + r * kSpanBytes);
    codes[r] = _mm512_and_si512(_mm512_srli_epi16(packed, 2 * J), _mm512_set1_epi8(3));
  }
  for (int i = 0; i < X; ++i) {
    const __m512i digits = _mm512_loadu_si512(x + i * stride + J * kSpanBytes);
    for (int r = 0; r < kOutputs; ++r) sums[i][r] = _mm512_dpbusd_epi32(sums[i][r], codes[r], digits);
  }
}

template <int X>
AVX512 void Avx512Tile(const uint8_t* w, const int8_t* x, int64_t stride, int64_t spans, int32_t out[][kOutputs]) {
  __m512i sums[X][kOutputs];
  for (auto& row : sums) std::fill_n(row, kOutputs, _mm512_setzero_si512());
  for (int64_t s = 0; s < spans; ++s, w += kOutputs * kSpanBytes, x += kSpan) {
    Add<X, 0>(sums, w, x, stride);
    Add<X, 1>(sums, w, x, stride);
    Add<X, 2>(sums, w, x, stride);
    Add<X, 3>(sums, w, x, stride);
    Prefetch(w);
  }
  for (int i = 0; i < X; ++i) {
    __m256i half[kOutputs];
    for (int r = 0; r < kOutputs; ++r) {
      half[r] = _mm256_add_epi32(_mm512_castsi512_si256(sums[i][r]), _mm512_extracti64x4_epi64(sums[i][r], 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i]), Lanes(half[0], half[1], half[2], half[3]));
  }
}
#endif

// ---- Activations as whole numbers. ----

struct alignas(64) Line {  // of the cache: a load across two of them costs two
  int8_t values[64];
};

struct Activations {
  int64_t digits, m, padded, block, blocks;
  std::vector<Line> lines;    // per row: `padded` high digits, then as many low ones
  std::vector<float> steps;   // per row and block
  std::vector<int32_t> sums;  // of the whole numbers, per row and block

  Activations(int64_t M, int64_t m, int64_t digits, int64_t block)
      : digits(digits), m(m), padded((m + kSpan - 1) / kSpan * kSpan), block(block),
        blocks((padded + block - 1) / block), lines(M * digits * padded / 64), steps(M * blocks), sums(M * blocks) {}

  int8_t* Row(int64_t i) { return reinterpret_cast<int8_t*>(lines.data()) + i * digits * padded; }
};

INLINE int32_t Bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A block of a row; returns the sum. With an infinity or a NaN in it its step is NaN; activations below 1e-30 are zero.
INLINE int32_t Digits(const float* x, int64_t size, int64_t digits, int64_t stride, int8_t* values, float* step) {
  int32_t most = 0;  // of the bits: without sign these are in the floats' order, NaN last, and compilers vectorize it
  for (int64_t k = 0; k < size; ++k) most = std::max(most, Bits(x[k]) & 0x7fffffff);
  float largest;
  std::memcpy(&largest, &most, sizeof(largest));
  const float whole = digits == 2 ? 127 * 128 : 127;
  const bool finite = most < 0x7f800000;
  if (!finite || largest < 1e-30f) {
    for (int64_t d = 0; d < digits; ++d) std::memset(values + d * stride, 0, size);
    *step = finite ? 0 : std::numeric_limits<float>::quiet_NaN();
    return 0;
  }
  *step = largest / whole;
  const float inverse = whole / largest;
  constexpr float kRound = 3 << 22;  // added, it leaves the nearest whole number in the low bits
  int32_t sum = 0;
  if (digits == 1) {
    for (int64_t k = 0; k < size; ++k) {
      const int32_t q = Bits(x[k] * inverse + kRound) - Bits(kRound);
      values[k] = static_cast<int8_t>(q);
      sum += q;
    }
  } else {
    for (int64_t k = 0; k < size; ++k) {
      const int32_t q = Bits(x[k] * inverse + kRound) - Bits(kRound), high = (q + 64) >> 7;
      values[k] = static_cast<int8_t>(high);
      values[stride + k] = static_cast<int8_t>(q - high * 128);
      sum += q;
    }
  }
  return sum;
}

// Row i of `a` from x (m), whose g parts are multiplied by `scales` first.
INLINE void QuantizeRow(Activations& a, int64_t i, const float* x, const float* scales, int64_t g) {
  std::vector<float> row(a.padded);  // zeros past m
  for (int64_t k = 0, part = a.m / g; k < g; ++k) {
    for (int64_t j = k * part; j < (k + 1) * part; ++j) row[j] = x[j] * scales[k];
  }
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t at = b * a.block, size = std::min(a.block, a.padded - at), k = i * a.blocks + b;
    a.sums[k] = Digits(row.data() + at, size, a.digits, a.padded, a.Row(i) + at, &a.steps[k]);
  }
}

using Quantize = void (*)(Activations&, int64_t, const float*, const float*, int64_t);

void PlainQuantize(Activations& a, int64_t i, const float* x, const float* scales, int64_t g) {
  QuantizeRow(a, i, x, scales, g);
}

#if defined(__x86_64__)
AVX2 void Avx2Quantize(Activations& a, int64_t i, const float* x, const float* scales, int64_t g) {
  QuantizeRow(a, i, x, scales, g);
}

AVX512 void Avx512Quantize(Activations& a, int64_t i, const float* x, const float* scales, int64_t g) {
  QuantizeRow(a, i, x, scales, g);
}
#endif

// ---- Paths, the best first. ----

struct Path {
  const char* name;
  bool here;  // this processor has it
  Quantize quantize;
  Tile tiles[kDigitRows];  // by rows of digits, less 1
  int64_t widest;          // rows of digits of the fastest tile; even
};

#define TILES(T) {T<1>, T<2>, T<3>, T<4>, T<5>, T<6>}

const std::vector<Path>& Paths() {
  static const std::vector<Path> paths = {
#if defined(__x86_64__)
      {"avx512vnni",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni"),
       Avx512Quantize, TILES(Avx512Tile), 6},
      {"avx2", static_cast<bool>(__builtin_cpu_supports("avx2")), Avx2Quantize, TILES(Avx2Tile), 2},
#endif
      {"plain", true, PlainQuantize, TILES(PlainTile), 6},
  };
  return paths;
}

// The path of that name; "" is the best one here.
const Path* FindPath(std::string_view name) {
  for (const Path& path : Paths()) {
    if (path.here && (name.empty() || name == path.name)) return &path;
  }
  return nullptr;
}

// ---- Threads. ----

// body(0) ... body(count - 1), each once, on the pool's threads and this one.
void Parallel(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& body) {
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto work = std::make_shared<Work>();  // outlives this call in threads that come late and find nothing left
  const auto claim = [work, count, &body] {
    for (int64_t i; (i = work->next.fetch_add(1)) < count;) {
      body(i);
      work->done.fetch_add(1, std::memory_order_release);
    }
  };
  static const int64_t processors = std::thread::hardware_concurrency();
  const int64_t threads = std::min({pool.num_threads(), processors, count});
  for (int64_t t = 1; t < threads; ++t) pool.Schedule(std::function<void()>(claim));
  claim();
  for (int64_t turns = 0; work->done.load(std::memory_order_acquire) < count; ++turns) {
    if (turns > 1000) std::this_thread::yield();
  }
}

// ---- The product. ----

struct Product {
  const Path& path;
  Activations& x;
  int64_t M, n, s;
  const uint8_t* w;
  const float* groups;         // scales (blocks, s), or null
  std::vector<float> outputs;  // a factor per output
  float* y;

  // Outputs [first, last) of rows [i, i + rows) of x.
  void Strip(int64_t i, int64_t rows, int64_t first, int64_t last) const {
    const Tile tile = path.tiles[rows * x.digits - 1];
    for (int64_t j = first; j < last; j += kOutputs) {
      float sums[kDigitRows][kOutputs] = {};
      for (int64_t b = 0; b < x.blocks; ++b) {
        const int64_t at = b * x.block, spans = std::min(x.block, x.padded - at) / kSpan;
        int32_t out[kDigitRows][kOutputs];
        tile(w + j / kOutputs * x.padded + at, x.Row(i) + at, x.padded, spans, out);
        for (int64_t k = 0; k < rows; ++k) {
          const int64_t block = (i + k) * x.blocks + b;
          for (int r = 0; r < kOutputs; ++r) {
            // Unsigned, as it may pass 2^31 on the way to a result that does not.
            const uint32_t sum = x.digits == 2 ? 128u * out[2 * k][r] + out[2 * k + 1][r] : out[k][r];
            const float scale = groups ? groups[b * s + std::min(j + r, n - 1) * s / n] : 1;
            sums[k][r] += static_cast<float>(static_cast<int32_t>(sum - 2u * x.sums[block])) * x.steps[block] * scale;
          }
        }
      }
      const int64_t there = std::min(kOutputs, last - j);
      for (int64_t k = 0; k < rows; ++k) {
        for (int64_t r = 0; r < there; ++r) y[(i + k) * n + j + r] = sums[k][r] * outputs[j + r];
      }
    }
  }

  // As many rows of x at a time as fit a tile: they stay in the level-1 cache, the outputs in level 2.
  void Chunk(int64_t first, int64_t last) const {
    const int64_t most = path.widest / x.digits;
    for (int64_t i = 0; i < M; i += most) Strip(i, std::min(most, M - i), first, last);
  }
};

std::string Shape(ffi::Span<const int64_t> dims) {
  std::string text = "(";
  for (size_t k = 0; k < dims.size(); ++k) text += (k ? ", " : "") + std::to_string(dims[k]);
  return text + ")";
}

using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;

ffi::Error Ternary(ffi::ThreadPool pool, Floats x, Bytes w, Floats scales, ffi::ResultBuffer<ffi::F32> y,
                   int64_t digits, std::string_view name) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ss = scales.dimensions(), ys = y->dimensions();
  const std::string got = "x " + Shape(xs) + ", matrix " + Shape(ws) + ", scales " + Shape(ss) + ", y " + Shape(ys);
  if (xs.size() != 2 || ws.size() != 2 || ss.size() != 2 || ys.size() != 2) {
    return ffi::Error::InvalidArgument("all four have two dims: " + got);
  }
  const int64_t M = xs[0], m = xs[1], n = ys[1], g = ss[0], s = ss[1];
  if (ys[0] != M || ws[0] != (n + kOutputs - 1) / kOutputs || ws[1] != (m + kSpan - 1) / kSpan * kSpan) {
    return ffi::Error::InvalidArgument("x (M, m) and a matrix (ceil(n/4), 256 ceil(m/256)) give y (M, n): " + got);
  }
  if (M == 0 || n == 0) return ffi::Error::Success();
  if (m == 0 || g == 0 || s == 0 || m % g || n % s) {
    return ffi::Error::InvalidArgument("scales do not divide the matrix: " + got);
  }
  const bool grouped = g > 1 && s > 1, along_inputs = g > 1 && s == 1;
  if (grouped && m / g % kSpan) return ffi::Error::InvalidArgument("groups are not whole spans of 256: " + got);
  if (digits != 1 && digits != 2) return ffi::Error::InvalidArgument("digits are 1 or 2: " + std::to_string(digits));
  const Path* path = FindPath(name);
  if (path == nullptr) return ffi::Error::InvalidArgument("this processor has no path '" + std::string(name) + "'");
  const int64_t block = grouped ? m / g : digits == 2 ? ws[1] : kBlock;
  if (block > kLargestBlock) return ffi::Error::InvalidArgument("over 65536 inputs share a step: " + got);

  Activations a(M, m, digits, block);
  const float one = 1;
  const auto row = [&](int64_t i) {
    path->quantize(a, i, x.typed_data() + i * m, along_inputs ? scales.typed_data() : &one, along_inputs ? g : 1);
  };
  if (M * m < 1 << 16) {
    for (int64_t i = 0; i < M; ++i) row(i);
  } else {
    Parallel(pool, M, row);
  }

  Product product{*path, a, M, n, s, w.typed_data(), grouped ? scales.typed_data() : nullptr, {}, y->typed_data()};
  product.outputs.assign(n, 1);
  for (int64_t k = 0; g == 1 && k < s; ++k) std::fill_n(&product.outputs[k * (n / s)], n / s, scales.typed_data()[k]);
  const int64_t bytes = kChunkBytes / std::min<int64_t>(M, 4);  // several rows of x take longer
  const int64_t chunk = kOutputs * std::max<int64_t>(bytes / a.padded, 4);
  const auto compute = [&](int64_t i) { product.Chunk(i * chunk, std::min(n, (i + 1) * chunk)); };
  Parallel(pool, (n + chunk - 1) / chunk, compute);
  return ffi::Error::Success();
}

// Reads a buffer, up to the last whole 256 bytes, with the same threads in the same chunks, and gives the exclusive or
// of its words: the measure of bandwidth.
ffi::Error Read(ffi::ThreadPool pool, Bytes buffer, ffi::ResultBuffer<ffi::U32> y) {
  if (y->element_count() != 1) return ffi::Error::InvalidArgument("y has one element, not " + Shape(y->dimensions()));
  constexpr int64_t kWords = 32, kStep = 8 * kWords;  // registers enough to keep loads in flight
  const int64_t size = buffer.element_count() / kStep * kStep;
  std::atomic<uint64_t> all{0};
  Parallel(pool, (size + kChunkBytes - 1) / kChunkBytes, [&](int64_t i) {
    uint64_t found[kWords] = {}, words[kWords], one = 0;
    for (int64_t at = i * kChunkBytes; at < std::min(size, (i + 1) * kChunkBytes); at += kStep) {
      const uint8_t* data = buffer.typed_data() + at;
      for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(data + kAhead + line);
      std::memcpy(words, data, kStep);
      for (int k = 0; k < kWords; ++k) found[k] ^= words[k];
    }
    for (uint64_t word : found) one ^= word;
    all.fetch_xor(one);
  });
  y->typed_data()[0] = static_cast<uint32_t>(all ^ all >> 32);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpectraTernary, Ternary,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("digits")
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpectraRead, Read,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Bytes>().Ret<ffi::Buffer<ffi::U32>>());

// The names of the paths that this processor has, the best first.
extern "C" const char* SpectraPaths() {
  static const std::string names = [] {
    std::string text;
    for (const Path& path : Paths()) text += path.here ? std::string(path.name) + " " : "";
    return text;
  }();
  return names.c_str();
}

// Whether the processor multiplies tiles of int8 (AMX). The kernel does not, XLA does.
extern "C" bool SpectraHasAmx() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 25 & 1);
#else
  return false;
#endif
}
