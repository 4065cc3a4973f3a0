#include "scan.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common.h"
#include "crc.h"

namespace megapoly {
namespace {

// Fewer bytes than asked for at the end of the file only.
std::size_t read_block(const std::string& path, int descriptor, std::vector<unsigned char>& block, std::int64_t at) {
    std::size_t done = 0;
    while (done < block.size()) {
        const ssize_t count = ::pread(descriptor, block.data() + done, block.size() - done,
                                      static_cast<off_t>(at) + static_cast<off_t>(done));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0)
            throw DataError(path + ": cannot be read at byte " +
                            std::to_string(at + static_cast<std::int64_t>(done)) + " (" + std::strerror(errno) + ")");
        if (count == 0) break;
        done += static_cast<std::size_t>(count);
    }
    return done;
}

// The place of the first id in the block that is negative or not below the vocabulary, -1 where all are inside.
template <typename Token>
std::int64_t first_outside(const Token* ids, std::int64_t count, std::int64_t vocabulary) {
    Token least = 0, most = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        least = std::min(least, ids[i]);
        most = std::max(most, ids[i]);
    }
    const auto outside = [&](Token id) { return id < 0 || static_cast<std::int64_t>(id) >= vocabulary; };
    if (!outside(least) && !outside(most)) return -1;
    return std::find_if(ids, ids + count, outside) - ids;
}

}  // namespace

Scanned scan(const std::string& path, int descriptor, int code, std::int64_t vocabulary, std::int64_t first,
             std::int64_t blocks) {
    Scanned found;
    std::vector<unsigned char> block(kBlock);  // operator new aligns it for every token type
    for (std::int64_t number = first; number < first + blocks; ++number) {
        const std::int64_t start = number * static_cast<std::int64_t>(kBlock);
        const std::size_t size = read_block(path, descriptor, block, start);
        if (size == 0) break;
        found.crcs.push_back(crc32(block.data(), size));
        std::int64_t wrong = -1, wrong_id = 0;
        if (code != 0)
            with_token_type(code, [&](auto token) {
                using Token = decltype(token);
                constexpr auto item = static_cast<std::int64_t>(sizeof(Token));
                const auto* ids = reinterpret_cast<const Token*>(block.data());
                const std::int64_t place = first_outside(ids, static_cast<std::int64_t>(size) / item, vocabulary);
                if (place < 0) return;
                wrong = start / item + place;
                wrong_id = static_cast<std::int64_t>(ids[place]);
            });
        found.wrong.push_back(wrong);
        found.wrong_ids.push_back(wrong_id);
    }
    return found;
}

}  // namespace megapoly
