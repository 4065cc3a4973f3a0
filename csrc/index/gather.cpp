#include "gather.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "common.h"

namespace megapoly {
void read_exactly(const std::string& path, int descriptor, void* into, std::size_t size, std::int64_t offset) {
    auto* at = static_cast<unsigned char*>(into);
    while (size > 0) {
        const ssize_t count = ::pread(descriptor, at, size, static_cast<off_t>(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0)
            throw DataError(path + ": cannot be read at byte " + std::to_string(offset) + " (" + std::strerror(errno) +
                            ")");
        if (count == 0)
            throw DataError(path + ": ends at byte " + std::to_string(offset) +
                            ", earlier than when it was opened; build it again");
        at += count;
        size -= static_cast<std::size_t>(count);
        offset += count;
    }
}

void refuse_id(const Tokens& tokens, std::int64_t token, std::int64_t id) {
    throw DataError(tokens.path + ": token " + std::to_string(token) + " has id " + std::to_string(id) +
                    ", outside the vocabulary of " + std::to_string(tokens.vocabulary) +
                    "; the file is damaged or of another tokenizer (`megapoly data verify` tells)");
}

void gather(const Tokens& tokens, const std::int64_t* starts, std::int64_t rows, std::int64_t length,
            std::int64_t* out) {
    if (tokens.count > (std::int64_t{1} << 58))  // the places of which fit 64 bits
        throw DataError(tokens.path + ": cannot have " + std::to_string(tokens.count) + " tokens");
    for (std::int64_t row = 0; row < rows; ++row)
        if (starts[row] < 0 || length > tokens.count || starts[row] > tokens.count - length)
            throw DataError(tokens.path + ": the window of " + std::to_string(length) + " tokens from token " +
                            std::to_string(starts[row]) + " leaves the file's " + std::to_string(tokens.count));
    if (rows == 0) return;
    with_token_type(tokens.code, [&](auto token) {
        using Token = decltype(token);
        std::vector<Token> window(static_cast<std::size_t>(length));
        const auto limit = static_cast<std::uint64_t>(std::max<std::int64_t>(tokens.vocabulary, 0));
        for (std::int64_t row = 0; row < rows; ++row) {
            read_exactly(tokens.path, tokens.descriptor, window.data(), window.size() * sizeof(Token),
                         starts[row] * static_cast<std::int64_t>(sizeof(Token)));
            std::int64_t* line = out + row * length;
            bool outside = false;
            for (std::int64_t i = 0; i < length; ++i) {
                line[i] = static_cast<std::int64_t>(window[static_cast<std::size_t>(i)]);
                outside |= static_cast<std::uint64_t>(line[i]) >= limit;
            }
            if (!outside) continue;
            std::int64_t i = 0;
            while (static_cast<std::uint64_t>(line[i]) < limit) ++i;
            refuse_id(tokens, starts[row] + i, line[i]);
        }
    });
}

}  // namespace megapoly
