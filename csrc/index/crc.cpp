#include "crc.h"

#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define MEGAPOLY_CARRY_LESS
#include <immintrin.h>
#endif

namespace megapoly {
namespace {

constexpr std::size_t kStride = 16;
using Tables = std::array<std::array<std::uint32_t, 256>, kStride>;

// tables[k][b]: the CRC of byte b followed by k zero bytes, so that sixteen bytes are folded in at a time.
Tables make_tables() noexcept {
    Tables tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
        tables[0][byte] = crc;
    }
    for (std::size_t k = 1; k < kStride; ++k)
        for (std::size_t byte = 0; byte < 256; ++byte)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFFU];
    return tables;
}

const Tables kTables = make_tables();

// `crc` is the register: the complement of the checksum so far.
std::uint32_t fold_by_tables(std::uint32_t crc, const unsigned char* at, std::size_t size) noexcept {
    for (; size >= kStride; size -= kStride, at += kStride) {
        std::uint32_t first;
        std::memcpy(&first, at, 4);
        first ^= crc;
        crc = kTables[15][first & 0xFFU] ^ kTables[14][(first >> 8) & 0xFFU] ^ kTables[13][(first >> 16) & 0xFFU] ^
              kTables[12][first >> 24];
        for (std::size_t i = 4; i < kStride; ++i) crc ^= kTables[kStride - 1 - i][at[i]];
    }
    for (; size > 0; --size, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xFFU];
    return crc;
}

#ifdef MEGAPOLY_CARRY_LESS

constexpr std::size_t kLeast = 64;

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i x, __m128i by, __m128i next) noexcept {
    const __m128i low = _mm_clmulepi64_si128(x, by, 0x00), high = _mm_clmulepi64_si128(x, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009), whose
// constants for this polynomial, bits reflected, these are. `size` is a multiple of 16, and at least kLeast.
__attribute__((target("pclmul,sse4.1"))) std::uint32_t fold_carry_less(std::uint32_t crc, const unsigned char* data,
                                                                       std::size_t size) noexcept {
    const auto* at = reinterpret_cast<const __m128i*>(data);
    const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i a = _mm_xor_si128(_mm_loadu_si128(at), _mm_cvtsi32_si128(static_cast<int>(crc)));
    __m128i b = _mm_loadu_si128(at + 1), c = _mm_loadu_si128(at + 2), d = _mm_loadu_si128(at + 3);
    at += 4, size -= 64;
    for (; size >= 64; size -= 64, at += 4) {
        a = fold(a, by_64, _mm_loadu_si128(at));
        b = fold(b, by_64, _mm_loadu_si128(at + 1));
        c = fold(c, by_64, _mm_loadu_si128(at + 2));
        d = fold(d, by_64, _mm_loadu_si128(at + 3));
    }
    a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
    for (; size >= 16; size -= 16, ++at) a = fold(a, by_16, _mm_loadu_si128(at));
    // 128 bits to 64, and those to 32 by Barrett's reduction.
    const __m128i words = _mm_setr_epi32(-1, 0, -1, 0);
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_16, 0x10));
    const __m128i by_4 = _mm_set_epi64x(0, 0x0163cd6124);
    a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, words), by_4, 0x00), _mm_srli_si128(a, 4));
    const __m128i polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(a, words), polynomial, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, words), polynomial, 0x00);
    return static_cast<std::uint32_t>(_mm_extract_epi32(_mm_xor_si128(a, quotient), 1));
}

bool has_carry_less() noexcept {
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

const bool kCarryLess = has_carry_less();

#endif

}  // namespace

std::uint32_t crc32_by_tables(const void* data, std::size_t size, std::uint32_t before) noexcept {
    return ~fold_by_tables(~before, static_cast<const unsigned char*>(data), size);
}

std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t before) noexcept {
#ifdef MEGAPOLY_CARRY_LESS
    if (kCarryLess && size >= kLeast) {
        const auto* at = static_cast<const unsigned char*>(data);
        const std::size_t whole = size / 16 * 16;
        return ~fold_by_tables(fold_carry_less(~before, at, whole), at + whole, size - whole);
    }
#endif
    return crc32_by_tables(data, size, before);
}

}  // namespace megapoly
