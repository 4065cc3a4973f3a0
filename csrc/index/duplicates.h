// Which documents have been seen before, by a hash of their tokens.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common.h"
#include "part.h"

namespace megapoly {

struct Hash128 {
    std::uint64_t low = 0, high = 0;
    bool operator==(const Hash128& other) const noexcept { return low == other.low && high == other.high; }
};

// A polynomial hash (Carter and Wegman, 1979; the evaluation is Horner's) over the prime field of 2^127 - 1: the words
// of the input, 15 bytes each, little-endian, the last one filled with zeros, and then its length in bytes, are the
// coefficients; the point is a constant that was drawn at random. Two different inputs of at most b bytes are two
// different polynomials of at most n = b / 15 + 2 terms without a constant one, which agree in at most n points of
// 2^127: for a document of a million bytes a chance of 4e-34, and for any two of 10^9 such documents to meet 2e-16.
class PolynomialHash {
public:
    void update(const unsigned char* bytes, std::size_t size) noexcept;
    // The hash of all bytes so far; what follows begins anew.
    Hash128 finish() noexcept;

private:
    static constexpr std::size_t kWord = 15;
    using Wide = unsigned __int128;

    void fold(Wide word) noexcept;

    Wide state_ = 0;
    std::uint64_t size_ = 0;
    std::array<unsigned char, kWord + 1> waiting_{};
    std::size_t held_ = 0;  // of them
};

// Hashes of documents wait in a file without a name; a table of limited size then goes through them as often as needed,
// each time for a part of all hashes.
class Duplicates : public Documents {
public:
    // Bytes of the table for a hash, of which it is filled to at most 70 %.
    static constexpr std::int64_t kSlot = 16;

    explicit Duplicates(const std::string& path) : hashes_(path) {}

    void begin(std::int64_t) override {}
    void piece(const unsigned char* bytes, std::size_t size) override { hash_.update(bytes, size); }
    void end() override;

    // Marks all documents but the first of each content. Holds a bit for a document, and a table, `memory` bytes in all.
    // Returns the number of times that the hashes were gone through.
    std::int64_t find(std::int64_t memory);
    std::int64_t documents() const noexcept { return documents_; }
    // Throws DataError where [first, first + count) are not documents that find() has compared.
    void check(std::int64_t first, std::int64_t count) const;
    // After find(): 1 for every document of [first, first + count) that is the first of its content, else 0.
    void kept(std::int64_t first, std::int64_t count, std::uint8_t* flags) const;
    // After find(): how many of [first, first + count) are.
    std::int64_t count_kept(std::int64_t first, std::int64_t count) const;

private:
    bool is_kept(std::int64_t document) const noexcept {
        const auto at = static_cast<std::size_t>(document);
        return (repeated_[at / 64] >> (at % 64) & 1U) == 0;
    }
    void pass(std::int64_t number, std::int64_t passes, std::vector<Hash128>& table);

    Spool hashes_;
    PolynomialHash hash_;
    std::int64_t documents_ = 0;
    std::vector<std::uint64_t> repeated_;  // a bit for every document
    bool found_ = false;
};

}  // namespace megapoly
