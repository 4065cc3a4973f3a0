#include "batch.h"

#include <algorithm>
#include <vector>

#include "common.h"

namespace megapoly {
namespace {

constexpr std::int64_t kNotCounted = -1;

[[noreturn]] void damaged(const Boundaries& at, std::int64_t document) {
    throw DataError(at.path + ": is damaged at the index of document " + std::to_string(document) +
                    "; `megapoly data verify` finds where");
}

// First token of a document; of the one after the last, the number of tokens.
std::int64_t first_token(const Boundaries& at, std::int64_t document, std::int64_t tokens) {
    const std::int64_t sequence = at.indices[document];
    if (sequence == at.sequences) return tokens;
    if (sequence < 0 || sequence > at.sequences) damaged(at, document);
    return at.pointers[sequence] / at.item;
}

// Calls visit(token) with the first tokens of the documents that begin after `start` and before `stop`, ascending.
template <typename Visit>
void each_boundary(const Boundaries& at, std::int64_t tokens, std::int64_t start, std::int64_t stop, Visit&& visit) {
    std::int64_t low = 0, high = at.documents;
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (first_token(at, middle, tokens) <= start)
            low = middle + 1;
        else
            high = middle;
    }
    std::int64_t before = start;
    for (; low < at.documents; ++low) {
        const std::int64_t token = first_token(at, low, tokens);
        if (token >= stop) return;
        if (token < before || token <= start) damaged(at, low);
        if (token > before) visit(token);  // once where documents are empty
        before = token;
    }
}

void fill_places(const Tokens& tokens, const Boundaries& boundaries, std::int64_t start, std::int64_t length,
                 std::int64_t* labels, std::int64_t* positions, std::int32_t* documents) {
    std::int64_t done = 0;
    std::int32_t number = 0;
    const auto advance = [&](std::int64_t to) {
        for (std::int64_t i = done; i < to; ++i) positions[i] = i - done;
        std::fill(documents + done, documents + to, number);
        done = to;
    };
    each_boundary(boundaries, tokens.count, start, start + length + 1, [&](std::int64_t token) {
        const std::int64_t at = token - start;
        if (labels != nullptr) labels[at - 1] = kNotCounted;
        if (at == length) return;
        advance(at);
        ++number;
    });
    advance(length);
}

}  // namespace

void fill(const Tokens& tokens, const Boundaries* boundaries, const std::int64_t* starts, const std::int64_t* rows,
          std::int64_t count, std::int64_t length, std::int64_t limit, const Columns& out) {
    std::vector<std::int64_t> window(static_cast<std::size_t>(length + 1));
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t start = starts[i], at = rows[i] * length;
        if (start < 0 || start >= limit || limit > tokens.count)
            throw DataError(tokens.path + ": the window from token " + std::to_string(start) + " leaves the file's " +
                            std::to_string(std::min(limit, tokens.count)));
        std::int64_t* labels = out.tokens != nullptr ? out.labels + at : nullptr;
        if (out.tokens != nullptr) {
            const std::int64_t there = std::min(length + 1, limit - start);
            gather(tokens, &start, 1, there, window.data());
            const std::int64_t held = std::min(there, length);
            std::copy_n(window.data(), held, out.tokens + at);
            std::fill(out.tokens + at + held, out.tokens + at + length, 0);
            std::copy_n(window.data() + 1, there - 1, labels);
            std::fill(labels + there - 1, labels + length, kNotCounted);
        }
        std::int64_t* positions = out.positions + at;
        if (boundaries != nullptr)
            fill_places(tokens, *boundaries, start, length, labels, positions, out.documents + at);
        else
            for (std::int64_t k = 0; k < length; ++k) positions[k] = k;
    }
}

}  // namespace megapoly
