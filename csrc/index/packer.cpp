#include "packer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "common.h"

namespace megapoly {
namespace {

// A set of numbers below a limit, of which the least that is not below another is found in a few steps: every level has
// a bit for each word of the one below that is not zero.
class Numbers {
public:
    explicit Numbers(std::int64_t limit) {
        auto size = static_cast<std::size_t>(limit);
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(std::int64_t number) {
        auto at = static_cast<std::size_t>(number);
        for (auto& level : levels_) {
            level[at / 64] |= std::uint64_t{1} << (at % 64);
            at /= 64;
        }
    }

    void remove(std::int64_t number) {
        auto at = static_cast<std::size_t>(number);
        for (auto& level : levels_) {
            level[at / 64] &= ~(std::uint64_t{1} << (at % 64));
            if (level[at / 64] != 0) return;
            at /= 64;
        }
    }

    // -1 where all are below.
    std::int64_t least_from(std::int64_t number) const {
        auto at = static_cast<std::size_t>(number);
        for (std::size_t i = 0; i < levels_.size(); ++i) {
            if (at / 64 >= levels_[i].size()) return -1;
            const std::uint64_t bits = levels_[i][at / 64] >> (at % 64);
            if (bits != 0) {
                at += static_cast<std::size_t>(__builtin_ctzll(bits));
                while (i-- > 0) at = at * 64 + static_cast<std::size_t>(__builtin_ctzll(levels_[i][at]));
                return static_cast<std::int64_t>(at);
            }
            at = at / 64 + 1;
        }
        return -1;
    }

private:
    std::vector<std::vector<std::uint64_t>> levels_;
};

}  // namespace

std::vector<std::int32_t> best_fit(const std::int32_t* lengths, std::int64_t count, std::int64_t pack) {
    if (count > std::numeric_limits<std::int32_t>::max())
        throw DataError(std::to_string(count) + " documents are too many to pack together");
    if (std::any_of(lengths, lengths + count, [&](std::int32_t length) { return length < 1 || length > pack; }))
        throw DataError("a length is not from 1 to that of a pack, " + std::to_string(pack));
    const auto size = static_cast<std::size_t>(count), lines = static_cast<std::size_t>(pack + 1);
    std::vector<std::int32_t> order(size), begins(lines + 1, 0);  // by counting, longest first, else as they came
    for (std::size_t i = 0; i < size; ++i) ++begins[lines - static_cast<std::size_t>(lengths[i])];
    for (std::size_t line = 1; line <= lines; ++line) begins[line] += begins[line - 1];
    for (std::size_t i = size; i-- > 0;)
        order[static_cast<std::size_t>(--begins[lines - static_cast<std::size_t>(lengths[i])])] = static_cast<std::int32_t>(i);

    std::vector<std::int32_t> packs(size), below;  // below: the pack of the same room that was filled before
    std::vector<std::int32_t> top(lines, -1);      // by room: the pack that was filled last
    Numbers rooms(pack + 1);
    for (const std::int32_t item : order) {
        const std::int64_t length = lengths[item];
        std::int64_t room = rooms.least_from(length);
        std::int32_t chosen;
        if (room < 0) {
            chosen = static_cast<std::int32_t>(below.size());
            below.push_back(-1);
            room = pack;
        } else {
            auto& head = top[static_cast<std::size_t>(room)];
            chosen = head;
            head = below[static_cast<std::size_t>(chosen)];
            if (head < 0) rooms.remove(room);
        }
        packs[static_cast<std::size_t>(item)] = chosen;
        if ((room -= length) == 0) continue;
        auto& head = top[static_cast<std::size_t>(room)];
        if (head < 0) rooms.insert(room);
        below[static_cast<std::size_t>(chosen)] = head;
        head = chosen;
    }
    return packs;
}

Packer::Packer(Writer& to, std::int64_t pack, std::int64_t end) : to_(to), pack_(pack), end_(end), item_(0) {
    if (pack < 2 || pack > kTokens)
        throw DataError(to.path() + ": packs of " + std::to_string(pack) + " tokens; expected 2 to " +
                        std::to_string(kTokens));
    with_token_type(to.code(), [&](auto type) {
        using Token = decltype(type);
        item_ = sizeof(Token);
        if (end < 0 || static_cast<std::uint64_t>(end) > static_cast<std::uint64_t>(std::numeric_limits<Token>::max()))
            throw DataError(to.path() + ": id " + std::to_string(end) + " is none of the file's type");
        const std::vector<Token> row(static_cast<std::size_t>(pack), static_cast<Token>(end));
        bytes_.reserve(static_cast<std::size_t>(kTokens + pack) * sizeof(Token));  // and does not grow to twice that
        padding_.resize(row.size() * sizeof(Token));
        std::memcpy(padding_.data(), row.data(), padding_.size());
    });
}

std::int64_t Packer::token(const unsigned char* bytes) const {
    return with_token_type(to_.code(), [&](auto type) {
        std::memcpy(&type, bytes, sizeof(type));
        return static_cast<std::int64_t>(type);
    });
}

void Packer::begin(std::int64_t tokens) {
    require_whole();
    open_ = true;
    left_ = tokens;
    if (tokens > pack_) ++cut_;
}

// A piece is as long as a pack, or what is left.
void Packer::begin_piece() {
    whole_ = left_ >= pack_;
    const std::int64_t length = whole_ ? pack_ : left_;
    inner_ = length * item_;
    left_ -= length;
    if (whole_)
        to_.begin(length);
    else
        lengths_.push_back(static_cast<std::int32_t>(length));
}

void Packer::piece(const unsigned char* bytes, std::size_t size) {
    if (size == 0) return;
    while (size > 0) {
        if (inner_ == 0) {
            if (left_ == 0) throw DataError(to_.path() + ": more of a document came than its length");
            begin_piece();
            if (!whole_ && inner_ > item_ && token(bytes) == end_)
                throw DataError(to_.path() + ": a document (or what was left of one after a cut) begins with id " +
                                std::to_string(end_) + ", with which packs are padded; build without packs");
        }
        const auto part = std::min(size, static_cast<std::size_t>(inner_));
        if (whole_)
            to_.piece(bytes, part);
        else
            bytes_.insert(bytes_.end(), bytes, bytes + part);
        bytes += part;
        size -= part;
        inner_ -= static_cast<std::int64_t>(part);
        if (inner_ == 0 && whole_) to_.end();
    }
    last_ = token(bytes - item_);
}

void Packer::end() {
    if (last_ != end_)
        throw DataError(to_.path() + ": a document ends with id " + std::to_string(last_) + ", and the first one with " +
                        std::to_string(end_) + "; packs are padded with the id that ends all documents");
    if (left_ != 0 || inner_ != 0) throw DataError(to_.path() + ": less of a document came than its length");
    open_ = false;
    if (static_cast<std::int64_t>(bytes_.size()) >= kTokens * item_ || static_cast<std::int64_t>(lengths_.size()) >= kDocuments)
        flush();
}

void Packer::require_whole() const {
    if (open_) throw DataError(to_.path() + ": a document before did not come whole; pack them again");
}

void Packer::flush() {
    require_whole();
    const std::vector<std::int32_t> packs = best_fit(lengths_.data(), static_cast<std::int64_t>(lengths_.size()), pack_);
    // The documents of a pack in their order, linked from last to first; a pack is written at its first document.
    std::vector<std::int32_t> first(packs.size(), -1), after(packs.size(), -1);
    std::vector<std::int64_t> starts(packs.size());
    std::int64_t start = static_cast<std::int64_t>(bytes_.size());
    for (std::size_t i = packs.size(); i-- > 0;) {
        auto& head = first[static_cast<std::size_t>(packs[i])];
        after[i] = head;
        head = static_cast<std::int32_t>(i);
        starts[i] = start -= lengths_[i] * item_;
    }
    for (std::size_t i = 0; i < packs.size(); ++i) {
        if (first[static_cast<std::size_t>(packs[i])] != static_cast<std::int32_t>(i)) continue;
        std::int64_t room = pack_;
        for (auto each = static_cast<std::int32_t>(i); each >= 0; each = after[static_cast<std::size_t>(each)]) {
            const std::int64_t length = lengths_[static_cast<std::size_t>(each)];
            to_.begin(length);
            to_.piece(bytes_.data() + starts[static_cast<std::size_t>(each)], static_cast<std::size_t>(length * item_));
            to_.end();
            room -= length;
        }
        if (room == 0) continue;
        to_.begin(room);
        to_.piece(padding_.data(), static_cast<std::size_t>(room * item_));
        to_.end();
        ++padded_;
        padding_tokens_ += room;
    }
    bytes_.clear();
    lengths_.clear();
}

}  // namespace megapoly
