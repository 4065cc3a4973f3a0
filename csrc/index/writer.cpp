#include "writer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

namespace megapoly {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr std::uint64_t kVersion = 1;

}  // namespace

Writer::Writer(const std::string& bin_path, const std::string& idx_path, int code, std::int64_t vocabulary)
    : bin_(bin_path), idx_(idx_path), code_(code), item_size_(0), vocabulary_(vocabulary), lengths_(idx_path) {
    with_token_type(code, [&](auto token) {
        using Token = decltype(token);
        item_size_ = sizeof(Token);
        const auto largest = static_cast<std::uint64_t>(std::numeric_limits<Token>::max());
        if (vocabulary < 1 || static_cast<std::uint64_t>(vocabulary - 1) > largest)
            throw DataError(bin_path + ": a vocabulary of " + std::to_string(vocabulary) +
                            " does not fit token ids of at most " + std::to_string(largest));
    });
}

template <typename Id>
void Writer::check(const Id* ids, std::int64_t count, const std::int64_t* lengths,
                   std::int64_t documents) const {
    const std::string where = bin_.path() + ": ";
    std::int64_t left = count;
    for (std::int64_t i = 0; i < documents; ++i) {
        if (lengths[i] < 1 || lengths[i] > std::numeric_limits<std::int32_t>::max())
            throw DataError(where + "document " + std::to_string(documents_ + i) +
                            " has " + std::to_string(lengths[i]) + " tokens; expected 1 to 2147483647");
        if (lengths[i] > left)
            throw DataError(where + "the lengths sum to more than the " + std::to_string(count) + " ids");
        left -= lengths[i];
    }
    if (left != 0) throw DataError(where + "the lengths sum to " + std::to_string(left) + " less than the ids");
    Id least = 0, most = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        least = std::min(least, ids[i]);
        most = std::max(most, ids[i]);
    }
    if (least >= 0 && most < vocabulary_) return;
    std::int64_t i = 0;
    while (ids[i] >= 0 && ids[i] < vocabulary_) ++i;
    throw DataError(where + "token " + std::to_string(tokens_ + i) + ": id " + std::to_string(ids[i]) +
                    " is outside the vocabulary of " + std::to_string(vocabulary_));
}

template <typename Id>
void Writer::append(const Id* ids, std::int64_t count, const std::int64_t* lengths, std::int64_t documents) {
    check(ids, count, lengths, documents);
    require_whole();
    failed_ = true;  // until all of it is written
    with_token_type(code_, [&](auto token) {
        using Token = decltype(token);
        std::array<Token, 4096> part;
        for (std::int64_t done = 0; done < count;) {
            const auto size = static_cast<std::size_t>(std::min<std::int64_t>(count - done, part.size()));
            for (std::size_t i = 0; i < size; ++i) part[i] = static_cast<Token>(ids[done + static_cast<std::int64_t>(i)]);
            bin_.write(part.data(), size * sizeof(Token));
            done += static_cast<std::int64_t>(size);
        }
    });
    for (std::int64_t i = 0; i < documents; ++i) {
        const auto length = static_cast<std::int32_t>(lengths[i]);
        lengths_.append(&length, sizeof(length));
    }
    documents_ += documents;
    tokens_ += count;
    failed_ = false;
}

void Writer::require_whole() const {
    if (failed_) throw DataError(bin_.path() + ": could not be written before, and lacks a part; write it again");
}

template void Writer::append(const std::int32_t*, std::int64_t, const std::int64_t*, std::int64_t);
template void Writer::append(const std::int64_t*, std::int64_t, const std::int64_t*, std::int64_t);

void Writer::begin(std::int64_t tokens) {
    require_whole();
    if (tokens < 1 || tokens > std::numeric_limits<std::int32_t>::max())
        throw DataError(bin_.path() + ": document " + std::to_string(documents_) + " has " + std::to_string(tokens) +
                        " tokens; expected 1 to 2147483647");
    const auto length = static_cast<std::int32_t>(tokens);
    failed_ = true;  // until end()
    lengths_.append(&length, sizeof(length));
    missing_ += tokens * item_size_;
    ++documents_;
    tokens_ += tokens;
}

void Writer::piece(const unsigned char* bytes, std::size_t size) {
    bin_.write(bytes, size);
    missing_ -= static_cast<std::int64_t>(size);
}

void Writer::end() {
    if (missing_ != 0)
        throw DataError(bin_.path() + ": document " + std::to_string(documents_ - 1) + " ends " +
                        std::to_string(missing_) + " bytes before its length");
    failed_ = false;
}

Written Writer::finish() {
    require_whole();
    bin_.finish();
    idx_.write(kMagic, sizeof(kMagic));
    idx_.put(kVersion);
    idx_.put(static_cast<std::uint8_t>(code_));
    idx_.put(static_cast<std::uint64_t>(documents_));
    idx_.put(static_cast<std::uint64_t>(documents_ + 1));
    lengths_.read([&](const unsigned char* bytes, std::size_t size) { idx_.write(bytes, size); });
    std::int64_t pointer = 0;
    std::vector<std::int64_t> pointers;
    lengths_.read([&](const unsigned char* bytes, std::size_t size) {
        pointers.resize(size / sizeof(std::int32_t));
        for (std::int64_t& each : pointers) {
            std::int32_t length;
            std::memcpy(&length, bytes, sizeof(length));
            bytes += sizeof(length);
            each = pointer;
            pointer += length * item_size_;
        }
        idx_.write(pointers.data(), pointers.size() * sizeof(std::int64_t));
    });
    for (std::int64_t document = 0; document <= documents_; ++document) idx_.put(document);
    idx_.finish();
    return {documents_, tokens_, bin_.block_crcs(), idx_.block_crcs()};
}

}  // namespace megapoly
