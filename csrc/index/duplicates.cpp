#include "duplicates.h"

#include <algorithm>
#include <cstring>

namespace megapoly {
namespace {

using Wide = unsigned __int128;

constexpr Wide kPrime = (Wide{1} << 127) - 1;
constexpr Wide kPoint = (Wide{0x0c1985c4b2e17b71U} << 64) | 0xb6392993717637eeU;
constexpr std::int64_t kSpare = 1024;  // slots, for tables so small that chance fills one more than another

Wide reduced(Wide value) noexcept {
    value = (value & kPrime) + (value >> 127);
    return value >= kPrime ? value - kPrime : value;
}

// a b modulo 2^127 - 1, of factors below it.
Wide times(Wide a, Wide b) noexcept {
    const auto a0 = static_cast<std::uint64_t>(a), a1 = static_cast<std::uint64_t>(a >> 64);
    const auto b0 = static_cast<std::uint64_t>(b), b1 = static_cast<std::uint64_t>(b >> 64);
    const Wide low = Wide{a0} * b0;
    const Wide middle = Wide{a0} * b1 + Wide{a1} * b0;  // below 2^128, since a1 and b1 are below 2^63
    const Wide high = Wide{a1} * b1;
    // a b = low + middle 2^64 + high 2^128, and 2^127 is 1.
    const Wide carried = (low >> 64) + (middle & 0xFFFFFFFFFFFFFFFFU);
    const Wide bottom = (carried << 64) | static_cast<std::uint64_t>(low);          // bits 0 to 127 of the product
    const Wide top = high + (middle >> 64) + (carried >> 64);                       // from bit 128 on
    return reduced(reduced((bottom & kPrime) + (bottom >> 127)) + reduced(top << 1));  // top is below 2^126
}

// 15 bytes, by two loads that overlap.
Wide word_at(const unsigned char* at) noexcept {
    std::uint64_t low, high;
    std::memcpy(&low, at, 8);
    std::memcpy(&high, at + 7, 8);
    return (Wide{high >> 8} << 64) | low;
}

// The powers of the point: four words are folded in by products that do not wait for each other.
struct Powers {
    Wide second = times(kPoint, kPoint), third = times(second, kPoint), fourth = times(second, second);
};
const Powers kPowers;

// SplitMix64's finalizer (Steele, Lea, Flood 2014).
std::uint64_t mixed(std::uint64_t z) noexcept {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
}

// A number below `count` from a hash.
std::int64_t scaled(std::uint64_t hash, std::int64_t count) noexcept {
    return static_cast<std::int64_t>((Wide{hash} * static_cast<std::uint64_t>(count)) >> 64);
}

}  // namespace

void PolynomialHash::fold(Wide word) noexcept { state_ = times(reduced(state_ + word), kPoint); }

void PolynomialHash::update(const unsigned char* bytes, std::size_t size) noexcept {
    size_ += size;
    if (held_ > 0) {
        const std::size_t part = std::min(size, kWord - held_);
        std::memcpy(waiting_.data() + held_, bytes, part);
        held_ += part;
        bytes += part;
        size -= part;
        if (held_ < kWord) return;
        fold(word_at(waiting_.data()));
        held_ = 0;
    }
    for (; size >= 4 * kWord; size -= 4 * kWord, bytes += 4 * kWord) {
        const Wide first = times(reduced(state_ + word_at(bytes)), kPowers.fourth);
        const Wide second = times(word_at(bytes + kWord), kPowers.third);
        const Wide third = times(word_at(bytes + 2 * kWord), kPowers.second);
        const Wide fourth = times(word_at(bytes + 3 * kWord), kPoint);
        state_ = reduced(reduced(first + second) + reduced(third + fourth));
    }
    for (; size >= kWord; size -= kWord, bytes += kWord) fold(word_at(bytes));
    std::memcpy(waiting_.data(), bytes, size);
    held_ = size;
}

Hash128 PolynomialHash::finish() noexcept {
    if (held_ > 0) {
        std::memset(waiting_.data() + held_, 0, kWord - held_);
        fold(word_at(waiting_.data()));
    }
    fold(size_);
    const Hash128 result{static_cast<std::uint64_t>(state_), static_cast<std::uint64_t>(state_ >> 64)};
    state_ = 0;
    size_ = 0;
    held_ = 0;
    return result;
}

void Duplicates::end() {
    const Hash128 hash = hash_.finish();
    hashes_.append(&hash, sizeof(hash));
    ++documents_;
    found_ = false;
}

std::int64_t Duplicates::find(std::int64_t memory) {
    const std::int64_t bits = documents_ / 8 + 8, left = std::max<std::int64_t>(memory, 0) - bits;
    const auto slots_for = [](std::int64_t hashes) { return hashes + hashes / 7 * 3 + kSpare; };
    if (left < slots_for(0) * kSlot || left < bits)
        throw DataError("the removal of duplicates among " + std::to_string(documents_) + " documents needs at least " +
                        std::to_string((std::max(2 * bits, bits + slots_for(0) * kSlot) >> 20) + 1) +
                        " MB of memory; raise memory_mb");
    std::int64_t passes = 1;
    while (slots_for(documents_ / passes + 1) * kSlot > left) ++passes;
    repeated_.assign(static_cast<std::size_t>(documents_ / 64 + 1), 0);
    std::vector<Hash128> table(static_cast<std::size_t>(slots_for(documents_ / passes + 1)));
    for (std::int64_t number = 0; number < passes; ++number) {
        std::fill(table.begin(), table.end(), Hash128{});
        pass(number, passes, table);
    }
    found_ = true;
    return passes;
}

void Duplicates::pass(std::int64_t number, std::int64_t passes, std::vector<Hash128>& table) {
    std::int64_t document = 0;
    std::size_t filled = 0;
    hashes_.read([&](const unsigned char* bytes, std::size_t size) {
        for (; size > 0; size -= sizeof(Hash128), bytes += sizeof(Hash128), ++document) {
            Hash128 hash;
            std::memcpy(&hash, bytes, sizeof(hash));
            if (scaled(mixed(hash.low ^ 0x9E3779B97F4A7C15U), passes) != number) continue;
            if (hash == Hash128{}) hash.high = ~std::uint64_t{0};  // an empty slot is zero; no hash has the highest bit
            auto slot = static_cast<std::size_t>(scaled(mixed(hash.high ^ hash.low), static_cast<std::int64_t>(table.size())));
            while (!(table[slot] == Hash128{}) && !(table[slot] == hash)) slot = slot + 1 == table.size() ? 0 : slot + 1;
            if (table[slot] == hash) {
                const auto at = static_cast<std::size_t>(document);
                repeated_[at / 64] |= std::uint64_t{1} << (at % 64);
                continue;
            }
            if (++filled == table.size()) throw DataError("the table of documents is full; raise memory_mb");
            table[slot] = hash;
        }
    });
}

void Duplicates::check(std::int64_t first, std::int64_t count) const {
    if (!found_ || first < 0 || count < 0 || first > documents_ - count)
        throw DataError("documents " + std::to_string(first) + " and " + std::to_string(count) + " after it are not of the " +
                        std::to_string(found_ ? documents_ : 0) + " that were compared");
}

void Duplicates::kept(std::int64_t first, std::int64_t count, std::uint8_t* flags) const {
    check(first, count);
    for (std::int64_t i = 0; i < count; ++i) flags[i] = is_kept(first + i) ? 1 : 0;
}

std::int64_t Duplicates::count_kept(std::int64_t first, std::int64_t count) const {
    check(first, count);
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) kept += is_kept(first + i) ? 1 : 0;
    return kept;
}

}  // namespace megapoly
