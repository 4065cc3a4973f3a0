// Keys and keyed permutations of ranges, without a table: bit for bit megapoly.data.permutation, where the reasons are.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace megapoly {

// BLAKE2b (RFC 7693) of 8 bytes, personal to megapoly, as a little-endian number.
std::uint64_t key_of(const std::string& text);

// A permutation of the range of `size` numbers, 1 to 2^62, by a Feistel network of 8 rounds with cycle walking.
class Permutation {
public:
    Permutation() : Permutation(0, 1) {}
    Permutation(std::uint64_t key, std::int64_t size);

    // Where `index`, below the size, is taken.
    std::int64_t operator()(std::int64_t index) const noexcept {
        auto x = static_cast<std::uint64_t>(index);
        do x = once(x);
        while (x >= size_);
        return static_cast<std::int64_t>(x);
    }
    // What is taken to `image`.
    std::int64_t inverse(std::int64_t image) const noexcept;

private:
    static constexpr int kRounds = 8;

    // SplitMix64's finalizer (Steele, Lea, Flood 2014).
    static std::uint64_t mix(std::uint64_t z) noexcept {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
        return z ^ (z >> 31);
    }

    std::uint64_t once(std::uint64_t x) const noexcept {
        std::uint64_t left = x >> half_, right = x & mask_;
        for (const std::uint64_t key : keys_) {
            const std::uint64_t next = left ^ (mix(right ^ key) & mask_);
            left = right;
            right = next;
        }
        return (left << half_) | right;
    }

    std::array<std::uint64_t, kRounds> keys_;
    std::uint64_t size_, mask_;
    int half_;
};

}  // namespace megapoly
