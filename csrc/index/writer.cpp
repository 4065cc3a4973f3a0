#include "writer.h"

#include <limits>

namespace megapoly {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr std::uint64_t kVersion = 1;

}  // namespace

Writer::Writer(const std::string& bin_path, const std::string& idx_path, int code, std::int64_t vocabulary)
    : bin_(bin_path), idx_(idx_path), code_(code), item_size_(0), vocabulary_(vocabulary) {
    with_token_type(code, [&](auto token) {
        using Token = decltype(token);
        item_size_ = sizeof(Token);
        const auto largest = static_cast<std::uint64_t>(std::numeric_limits<Token>::max());
        if (vocabulary < 1 || static_cast<std::uint64_t>(vocabulary - 1) > largest)
            throw DataError(bin_path + ": a vocabulary of " + std::to_string(vocabulary) +
                            " does not fit token ids of at most " + std::to_string(largest));
    });
}

void Writer::check(const std::int64_t* ids, std::int64_t count, const std::int64_t* lengths,
                   std::int64_t documents) const {
    const std::string where = bin_.path() + ": ";
    std::int64_t left = count;
    for (std::int64_t i = 0; i < documents; ++i) {
        if (lengths[i] < 1 || lengths[i] > std::numeric_limits<std::int32_t>::max())
            throw DataError(where + "document " + std::to_string(static_cast<std::int64_t>(lengths_.size()) + i) +
                            " has " + std::to_string(lengths[i]) + " tokens; expected 1 to 2147483647");
        if (lengths[i] > left)
            throw DataError(where + "the lengths sum to more than the " + std::to_string(count) + " ids");
        left -= lengths[i];
    }
    if (left != 0) throw DataError(where + "the lengths sum to " + std::to_string(left) + " less than the ids");
    const auto limit = static_cast<std::uint64_t>(vocabulary_);
    for (std::int64_t i = 0; i < count; ++i)
        if (static_cast<std::uint64_t>(ids[i]) >= limit)
            throw DataError(where + "token " + std::to_string(tokens_ + i) + ": id " + std::to_string(ids[i]) +
                            " is outside the vocabulary of " + std::to_string(vocabulary_));
}

void Writer::append(const std::int64_t* ids, std::int64_t count, const std::int64_t* lengths, std::int64_t documents) {
    check(ids, count, lengths, documents);
    with_token_type(code_, [&](auto token) {
        using Token = decltype(token);
        for (std::int64_t i = 0; i < count; ++i) bin_.put(static_cast<Token>(ids[i]));
    });
    lengths_.reserve(lengths_.size() + static_cast<std::size_t>(documents));
    for (std::int64_t i = 0; i < documents; ++i) lengths_.push_back(static_cast<std::int32_t>(lengths[i]));
    tokens_ += count;
}

Written Writer::finish() {
    bin_.finish();
    const auto documents = static_cast<std::int64_t>(lengths_.size());
    idx_.write(kMagic, sizeof(kMagic));
    idx_.put(kVersion);
    idx_.put(static_cast<std::uint8_t>(code_));
    idx_.put(static_cast<std::uint64_t>(documents));
    idx_.put(static_cast<std::uint64_t>(documents + 1));
    idx_.write(lengths_.data(), lengths_.size() * sizeof(std::int32_t));
    std::int64_t pointer = 0;
    for (const std::int32_t length : lengths_) {
        idx_.put(pointer);
        pointer += length * item_size_;
    }
    for (std::int64_t document = 0; document <= documents; ++document) idx_.put(document);
    idx_.finish();
    return {documents, tokens_, bin_.block_crcs(), idx_.block_crcs()};
}

}  // namespace megapoly
