#include "bpe_tables.h"

#include <algorithm>
#include <functional>
#include <string>

#include "common.h"

namespace megapoly {

std::size_t characters_in(std::string_view valid) noexcept {
    return static_cast<std::size_t>(
        std::count_if(valid.begin(), valid.end(), [](char byte) { return (byte & 0xC0) != 0x80; }));
}

int byte_of(std::string_view piece) noexcept {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    if (piece.size() != 6 || piece.substr(0, 3) != "<0x" || piece[5] != '>') return -1;
    const std::size_t high = kDigits.find(piece[3]), low = kDigits.find(piece[4]);
    if (high == std::string_view::npos || low == std::string_view::npos) return -1;
    return static_cast<int>(high << 4 | low);
}

BpeTables::BpeTables(const BpeModel& model)
    : vocabulary_(static_cast<std::int32_t>(model.pieces.size())), near_(1U << 16, kNoNode), touching_(kTouchBits / 64) {
    if (model.byte_fallback) byte_ids_.assign(256, 0);
    for (std::int32_t id = 0; id < vocabulary_; ++id) {
        const Piece& piece = model.pieces[static_cast<std::size_t>(id)];
        if (piece.type == PieceType::kUnknown) unknown_ = id;
        if (piece.type == PieceType::kByte && model.byte_fallback)
            byte_ids_[static_cast<std::size_t>(byte_of(piece.text))] = id;
        if (piece.type != PieceType::kNormal || characters_in(piece.text) != 1) continue;
        const std::uint32_t code = decode(piece.text.data()).code;
        if (code < near_.size())
            near_[code] = id;
        else
            far_[code] = id;
    }
    for (const Piece& piece : model.pieces)
        if (piece.type == PieceType::kNormal) add_characters(piece.text);
    add_merges(model.pieces);
}

void BpeTables::add_characters(std::string_view piece) {
    std::uint32_t before = 0;
    for (std::size_t at = 0; at < piece.size();) {
        const Character here = decode(piece.data() + at);
        if (node(here.code) == kNoNode) {
            const std::int32_t added = vocabulary_ + characters_++;
            if (here.code < near_.size())
                near_[here.code] = added;
            else
                far_[here.code] = added;
        }
        if (at > 0) {
            const std::size_t bit = touch_bit(before, here.code);
            touching_[bit >> 6] |= std::uint64_t{1} << (bit & 63U);
        }
        before = here.code;
        at += here.length;
    }
}

void BpeTables::add_merges(const std::vector<Piece>& pieces) {
    std::unordered_map<std::string_view, std::int32_t> by_text;
    std::vector<float> scores;
    for (std::size_t id = 0; id < pieces.size(); ++id)
        if (pieces[id].type == PieceType::kNormal) {
            by_text.emplace(pieces[id].text, static_cast<std::int32_t>(id));
            scores.push_back(pieces[id].score);
        }
    std::sort(scores.begin(), scores.end(), std::greater<>());
    scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
    const auto find = [&](std::string_view part) {
        if (characters_in(part) == 1) return node(decode(part.data()).code);
        const auto found = by_text.find(part);
        return found == by_text.end() ? kNoNode : found->second;
    };
    std::vector<Merge> found;
    for (const auto& [text, id] : by_text) {
        const auto place = std::lower_bound(scores.begin(), scores.end(), pieces[static_cast<std::size_t>(id)].score,
                                            std::greater<>());
        const auto rank = static_cast<std::uint32_t>(place - scores.begin());
        for (std::size_t at = decode(text.data()).length; at < text.size(); at += decode(text.data() + at).length) {
            const std::int32_t left = find(text.substr(0, at)), right = find(text.substr(at));
            if (left != kNoNode && right != kNoNode) found.push_back({pair_of(left, right), id, rank});
        }
    }
    unsigned bits = 4;
    while (std::size_t{1} << bits < 2 * found.size()) ++bits;
    merges_.resize(std::size_t{1} << bits);
    mask_ = merges_.size() - 1;
    filter_.resize(std::max<std::size_t>(1, merges_.size() / 16));
    filter_shift_ = 64 - (bits + 2);
    for (const Merge& merge : found) {
        const std::uint64_t hash = mix(merge.pair), bit = hash >> filter_shift_;
        filter_[bit >> 6] |= std::uint64_t{1} << (bit & 63U);
        std::size_t at = hash & mask_;
        while (merges_[at].node != kNoNode) at = (at + 1) & mask_;
        merges_[at] = merge;
    }
}

void BpeTables::join_unknown(std::vector<std::int32_t>& ids, std::size_t from) const {
    if (!byte_ids_.empty()) return;
    const auto both_unknown = [&](std::int32_t a, std::int32_t b) { return a == unknown_ && b == unknown_; };
    ids.erase(std::unique(ids.begin() + static_cast<std::ptrdiff_t>(from), ids.end(), both_unknown), ids.end());
}

}  // namespace megapoly
