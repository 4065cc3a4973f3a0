#include "part.h"

#include <fcntl.h>

#include <algorithm>
#include <utility>

#include "crc.h"
#include "gather.h"

namespace megapoly {

Part::Part(std::string path, int descriptor, std::int64_t size, int code, std::vector<std::uint32_t> crcs)
    : path_(std::move(path)),
      file_(path_, descriptor),
      size_(size),
      item_(with_token_type(code, [](auto token) { return static_cast<std::int64_t>(sizeof(token)); })),
      crcs_(std::move(crcs)),
      block_(kBlock) {
    if (size < 0) throw DataError(path_ + ": cannot have " + std::to_string(size) + " bytes");
    const std::size_t blocks = (static_cast<std::size_t>(size) + kBlock - 1) / kBlock;
    if (!crcs_.empty() && crcs_.size() != blocks)
        throw DataError(path_ + ": has " + std::to_string(blocks) + " blocks, and " + std::to_string(crcs_.size()) +
                        " checksums");
#ifdef __linux__
    ::posix_fadvise(file_.number(), 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
}

void Part::load(std::int64_t block) {
    if (block == loaded_) return;
    loaded_ = -1;
    const std::int64_t start = block * static_cast<std::int64_t>(kBlock);
    const auto size = static_cast<std::size_t>(std::min(static_cast<std::int64_t>(kBlock), size_ - start));
    read_exactly(path_, file_.number(), block_.data(), size, start);
    if (!crcs_.empty() && crc32(block_.data(), size) != crcs_[static_cast<std::size_t>(block)])
        throw DataError(path_ + ", bytes " + std::to_string(start) + " to " +
                        std::to_string(start + static_cast<std::int64_t>(size) - 1) +
                        ": the content has changed since it was built (checksum); build or copy it anew");
    loaded_ = block;
}

void Part::refuse(std::int64_t start, std::int64_t size) const {
    throw DataError(path_ + ": holds no bytes " + std::to_string(start) + " to " + std::to_string(start + size - 1) +
                    " in its " + std::to_string(size_));
}

void Part::hand_on(std::int64_t first, const std::int64_t* lengths, std::int64_t count, const std::uint8_t* keep,
                   Documents& to) {
    const std::int64_t tokens = size_ / item_;
    if (first < 0 || first > tokens)
        throw DataError(path_ + ": holds no token " + std::to_string(first) + " in its " + std::to_string(tokens));
    std::int64_t start = first * item_;
    for (std::int64_t i = 0; i < count; ++i) {
        if (lengths[i] < 0 || lengths[i] > tokens - start / item_)
            throw DataError(path_ + ": a document of " + std::to_string(lengths[i]) + " tokens from token " +
                            std::to_string(start / item_) + " on leaves the file's " + std::to_string(tokens));
        const std::int64_t size = lengths[i] * item_;
        if (lengths[i] != 0 && (keep == nullptr || keep[i] != 0)) {
            to.begin(lengths[i]);
            read(start, size, [&](const unsigned char* bytes, std::size_t there) { to.piece(bytes, there); });
            to.end();
        }
        start += size;
    }
}

}  // namespace megapoly
