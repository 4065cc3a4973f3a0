#include "batch.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "common.h"

namespace megapoly {
namespace {

constexpr int kNotCounted = -1;

std::int64_t item_size(int code) {
    return with_token_type(code, [](auto token) { return static_cast<std::int64_t>(sizeof(token)); });
}

// What ids of a marked dataset stand for, in the narrow type, which the compiler does many at a time.
template <typename Token, typename Id>
void unmark(const Token* ids, std::int64_t marked, bool all, std::int64_t held, std::int64_t there, Id* tokens,
            Id* labels) {
    using Narrow = std::make_unsigned_t<Token>;
    const auto first = static_cast<Narrow>(marked);  // in its range: larger ids would not be in the file's
    for (std::int64_t i = 0; i < held; ++i) {
        const auto id = static_cast<Narrow>(ids[i]);
        tokens[i] = static_cast<Id>(static_cast<Narrow>(id - (id >= first ? first : Narrow{0})));
    }
    if (all) {
        for (std::int64_t i = 0; i + 1 < there; ++i) {
            const auto id = static_cast<Narrow>(ids[i + 1]);
            labels[i] = static_cast<Id>(static_cast<Narrow>(id - (id >= first ? first : Narrow{0})));
        }
        return;
    }
    for (std::int64_t i = 0; i + 1 < there; ++i) {
        const auto id = static_cast<Narrow>(ids[i + 1]);
        const Id token = static_cast<Id>(static_cast<Narrow>(id - first));
        labels[i] = id >= first ? token : Id{kNotCounted};
    }
}

// Tokens and labels of one row, as far as there are any before `limit`.
template <typename Token, typename Id>
void fill_tokens(const Tokens& from, std::int64_t marked, bool all, std::int64_t start, std::int64_t length,
                 std::int64_t limit, std::vector<Token>& window, Id* tokens, Id* labels) {
    const std::int64_t there = std::min(length + 1, limit - start), held = std::min(there, length);
    const Token* ids = window.data();
    read_exactly(from.path, from.descriptor, window.data(), static_cast<std::size_t>(there) * sizeof(Token),
                 start * static_cast<std::int64_t>(sizeof(Token)));
    const auto outside = [&](Token id) {
        return static_cast<std::uint64_t>(static_cast<std::int64_t>(id)) >= static_cast<std::uint64_t>(from.vocabulary);
    };
    // Compared in the narrow type, which the compiler does many at a time; a wider vocabulary holds all ids but negative.
    using Narrow = std::make_unsigned_t<Token>;
    const auto most = static_cast<std::uint64_t>(std::is_signed_v<Token> ? static_cast<Narrow>(~Narrow{0}) >> 1
                                                                         : static_cast<Narrow>(~Narrow{0}));
    const auto largest = static_cast<Narrow>(std::min(most, static_cast<std::uint64_t>(from.vocabulary) - 1));
    Narrow seen = 0;
    for (std::int64_t i = 0; i < there; ++i) seen = std::max(seen, static_cast<Narrow>(ids[i]));
    if (seen > largest)
        for (std::int64_t i = 0; i < there; ++i)
            if (outside(ids[i])) refuse_id(from, start + i, static_cast<std::int64_t>(ids[i]));
    if (marked > 0) {
        unmark(ids, marked, all, held, there, tokens, labels);
    } else {
        for (std::int64_t i = 0; i < held; ++i) tokens[i] = static_cast<Id>(ids[i]);
        for (std::int64_t i = 0; i + 1 < there; ++i) labels[i] = static_cast<Id>(ids[i + 1]);
    }
    std::fill(tokens + held, tokens + length, Id{0});
    std::fill(labels + there - 1, labels + length, Id{kNotCounted});
}

}  // namespace

Descriptor::Descriptor(const std::string& path, int opened) : number_(::fcntl(opened, F_DUPFD_CLOEXEC, 0)) {
    if (number_ < 0) throw DataError(path + ": cannot be opened (" + std::strerror(errno) + ")");
}

Descriptor::~Descriptor() { ::close(number_); }

Dataset::Dataset(std::string bin_path, int bin, int code, std::int64_t tokens, std::string idx_path, int idx,
                 std::int64_t sequences, std::int64_t documents, std::int64_t padding, std::int64_t marked)
    : bin_path_(std::move(bin_path)),
      bin_(bin_path_, bin),
      idx_(idx_path, idx),
      code_(code),
      count_(tokens),
      padding_(padding < 0 || marked == 0 ? padding : padding % marked),
      marked_(marked),
      boundaries_({std::move(idx_path), idx_.number(), sequences, documents, tokens, item_size(code)}) {
    // A damaged file may hold more ids than these, but none in the type is then taken for another.
    const bool fits = with_token_type(code, [&](auto token) {
        return static_cast<std::uint64_t>(marked) <= static_cast<std::uint64_t>(std::numeric_limits<decltype(token)>::max());
    });
    if (marked < 0 || !fits)
        throw DataError(bin_path_ + ": " + std::to_string(marked) + " marked tokens are not in the range of its ids' type");
}

Tokens Dataset::tokens(std::int64_t vocabulary) const {
    if (marked_ > vocabulary)
        throw DataError(bin_path_ + ": its tokenizer has " + std::to_string(marked_) + " tokens, and the vocabulary is " +
                        std::to_string(vocabulary));
    return {bin_path_, bin_.number(), code_, count_, marked_ > 0 ? 2 * marked_ : vocabulary};
}

template <typename Id>
void fill(const Windows& windows, const Columns<Id>& out, std::vector<std::int32_t>* cu_seqlens, Progress& progress) {
    const std::int64_t length = windows.length;
    std::vector<std::int64_t> begins;
    std::vector<Id> places(static_cast<std::size_t>(length));  // copied: quicker than to count in every document
    std::iota(places.begin(), places.end(), Id{0});
    if (cu_seqlens != nullptr) cu_seqlens->push_back(0);
    for (std::int64_t row = 0; row < windows.rows; ++row) {
        const std::int64_t start = windows.starts[row], limit = windows.limits[row], base = row * length;
        const std::int32_t source = windows.source[row];
        Id* positions = out.positions + base;
        Id* labels = out.labels == nullptr ? nullptr : out.labels + base;
        begins.clear();
        if (source < 0) {
            if (labels != nullptr) {
                std::fill_n(out.tokens + base, length, Id{0});
                std::fill_n(labels, length, Id{kNotCounted});
            }
        } else {
            progress.source.store(source, std::memory_order_relaxed);
            const Dataset& dataset = *windows.sources[static_cast<std::size_t>(source)];
            if (start < 0 || start >= limit || limit > dataset.count())
                throw DataError(dataset.path() + ": the window from token " + std::to_string(start) +
                                " leaves the file's " + std::to_string(std::min(limit, dataset.count())));
            if (labels != nullptr) {
                const Tokens from = dataset.tokens(windows.vocabulary);
                with_token_type(from.code, [&](auto token) {
                    thread_local std::vector<decltype(token)> window;
                    if (static_cast<std::int64_t>(window.size()) <= length)
                        window.resize(static_cast<std::size_t>(length + 1));
                    fill_tokens(from, dataset.marked(), windows.all, start, length, limit, window,
                                out.tokens + base, labels);
                    progress.bytes.fetch_add((length + 1) * static_cast<std::int64_t>(sizeof(token)),
                                             std::memory_order_relaxed);
                });
            }
            if (cu_seqlens != nullptr)
                dataset.boundaries().between(start, std::min(start + length, limit - 1), begins);
        }
        std::int64_t done = 0;
        for (const std::int64_t token : begins) {
            const std::int64_t at = token - start;
            if (labels != nullptr) labels[at - 1] = Id{kNotCounted};
            if (at == length) break;
            std::copy_n(places.data(), at - done, positions + done);
            cu_seqlens->push_back(static_cast<std::int32_t>(base + at));
            done = at;
        }
        std::copy_n(places.data(), length - done, positions + done);
        if (labels != nullptr && source >= 0 && done > 0) {
            const std::int64_t padding = windows.sources[static_cast<std::size_t>(source)]->padding();
            if (padding >= 0 && out.tokens[base + done] == static_cast<Id>(padding))
                std::fill(labels + done, labels + length, Id{kNotCounted});
        }
        if (cu_seqlens != nullptr) cu_seqlens->push_back(static_cast<std::int32_t>(base + length));
    }
}

template void fill(const Windows&, const Columns<std::int32_t>&, std::vector<std::int32_t>*, Progress&);
template void fill(const Windows&, const Columns<std::int64_t>&, std::vector<std::int32_t>*, Progress&);

}  // namespace megapoly
