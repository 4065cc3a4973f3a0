#include "permutation.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>

namespace megapoly {
namespace {

constexpr std::size_t kPart = 128;  // bytes that BLAKE2b takes at a time

constexpr std::array<std::uint64_t, 8> kInitial = {
    0x6A09E667F3BCC908U, 0xBB67AE8584CAA73BU, 0x3C6EF372FE94F82BU, 0xA54FF53A5F1D36F1U,
    0x510E527FADE682D1U, 0x9B05688C2B3E6C1FU, 0x1F83D9ABFB41BD6BU, 0x5BE0CD19137E2179U,
};

// The order of the message's words, by round; rounds 10 and 11 are as 0 and 1.
constexpr unsigned char kOrder[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

constexpr std::uint64_t rotated(std::uint64_t x, int by) { return x >> by | x << (64 - by); }

using State = std::array<std::uint64_t, 8>;

// RFC 7693, 3.2: one part of a message of which `done` bytes, this part's included, have gone by.
void compress(State& state, const unsigned char* part, std::size_t done, bool last) {
    std::array<std::uint64_t, 16> words, v;
    std::memcpy(words.data(), part, kPart);
    std::copy(state.begin(), state.end(), v.begin());
    std::copy(kInitial.begin(), kInitial.end(), v.begin() + 8);
    v[12] ^= done;
    if (last) v[14] = ~v[14];
    const auto blend = [&](std::size_t a, std::size_t b, std::size_t c, std::size_t d, const unsigned char* order) {
        const std::uint64_t x = words[order[0]], y = words[order[1]];
        v[a] += v[b] + x;
        v[d] = rotated(v[d] ^ v[a], 32);
        v[c] += v[d];
        v[b] = rotated(v[b] ^ v[c], 24);
        v[a] += v[b] + y;
        v[d] = rotated(v[d] ^ v[a], 16);
        v[c] += v[d];
        v[b] = rotated(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
        const unsigned char* order = kOrder[round % 10];
        for (std::size_t i = 0; i < 4; ++i) blend(i, i + 4, i + 8, i + 12, order + 2 * i);  // the columns
        for (std::size_t i = 0; i < 4; ++i)                                                 // the diagonals
            blend(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, order + 2 * i + 8);
    }
    for (std::size_t i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

}  // namespace

std::uint64_t key_of(const std::string& text) {
    State state = kInitial;
    state[0] ^= 0x01010000U ^ sizeof(std::uint64_t);  // a plain hash, without a key, of so many bytes
    std::uint64_t person;
    std::memcpy(&person, "megapoly", sizeof(person));
    state[6] ^= person;
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    std::size_t done = 0;
    for (; text.size() - done > kPart; at += kPart) {
        done += kPart;
        compress(state, at, done, false);
    }
    std::array<unsigned char, kPart> rest{};
    std::copy(at, at + (text.size() - done), rest.begin());
    compress(state, rest.data(), text.size(), true);
    return state[0];
}

Permutation::Permutation(std::uint64_t key, std::int64_t size) {
    if (size < 1 || size > std::int64_t{1} << 62) throw std::invalid_argument("a permutation is of 1 to 2^62 numbers");
    size_ = static_cast<std::uint64_t>(size);
    int bits = 0;
    while ((size_ - 1) >> bits != 0) ++bits;
    half_ = std::max(3, (bits + 1) / 2);
    mask_ = (std::uint64_t{1} << half_) - 1;
    for (int i = 0; i < kRounds; ++i)
        keys_[static_cast<std::size_t>(i)] = mix(key + static_cast<std::uint64_t>(i + 1) * 0x9E3779B97F4A7C15U);
}

std::int64_t Permutation::inverse(std::int64_t image) const noexcept {
    auto x = static_cast<std::uint64_t>(image);
    do {
        std::uint64_t left = x >> half_, right = x & mask_;
        for (auto key = keys_.rbegin(); key != keys_.rend(); ++key) {
            const std::uint64_t before = right ^ (mix(left ^ *key) & mask_);
            right = left;
            left = before;
        }
        x = (left << half_) | right;
    } while (x >= size_);
    return static_cast<std::int64_t>(x);
}

}  // namespace megapoly
